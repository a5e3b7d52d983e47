"""Where metrics are shown: each optional, none able to slow or stop a step."""
