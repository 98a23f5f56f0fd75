"""How good and how fast a bundle is: metrics, judges, protocols, and the pages and cards that show them."""
