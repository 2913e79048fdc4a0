"""The page about a run, and the parts it shares with the other pages: plots, panels, tables."""
