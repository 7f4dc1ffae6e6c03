"""The server as its users meet it: real clients, real sockets, a real database."""
