"""PDCR and UAFS by the conventions of training frameworks; a module needs the framework it is named for."""
