"""Place recognition beyond the assignment: published systems as recipes of exchangeable parts."""
