"""Scorers over HTTP: the service, its web application, the server and the client."""
