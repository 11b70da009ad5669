"""What a person looks at: curves, pages, report.html, the run folder, the web page."""
