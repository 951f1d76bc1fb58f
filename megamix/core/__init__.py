"""What knows no word of the domain: errors, config loading, files, text for people, the log, processes."""
