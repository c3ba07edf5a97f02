"""Where each tensor of a file lies: headers and indexes, checked. Loads no tensor."""
