"""One self-contained HTML file about a run: `archscale.report.run.write_run_page`."""
