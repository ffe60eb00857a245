"""`gsae plan`: what a config will need, before anything runs."""
