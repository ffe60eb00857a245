"""Stage 4: one page, tables and plots of runs."""
