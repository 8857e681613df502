"""PDCR and UAFS by the conventions of training frameworks; each module needs the framework it is named for."""
