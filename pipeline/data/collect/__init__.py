"""Pages from the web, as far as robots.txt and licences allow."""
