"""Expert parallelism: every rank of ``ep`` holds some experts, and rows travel to them and back."""
