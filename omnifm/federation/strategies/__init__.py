"""One file per strategy. `omnifm.build` holds the table of their names."""
