"""Rules that act entry by entry: products of factors in blocks, the largest of them found, masks drawn, signs elected."""
