"""The memory that training needs: estimated, fitted into what there is, and made do with when it runs out."""
