"""Several machines that train one model: how they meet and agree, and learn of each other's end."""
