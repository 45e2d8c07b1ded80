"""From a finished run and a hospital's own files to answers in files, without a server."""
