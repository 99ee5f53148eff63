"""Control sockets: the requests to a running service, their answers, and how services are found."""
