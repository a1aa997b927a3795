"""`kosmos-g serve`: an HTTP service for programs, in the shape of OpenAI's image API."""
