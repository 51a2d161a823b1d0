"""Scored runs side by side: intervals, tables in Markdown and CSV, plots."""
