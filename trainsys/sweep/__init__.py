"""Many layouts of one run, a few steps each: what is fastest here, beside what the planner said."""
