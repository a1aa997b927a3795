"""What maps are used for while an image is drawn: to bind each image of a prompt to a region of its own, and to place it.

Bounded Attention (Dahary et al. 2024, arXiv 2403.16990) keeps subjects apart by what their places may attend to; Dense Diffusion
(Kim et al. 2023, arXiv 2308.12964) and paint-with-words (eDiff-I, Balaji et al. 2022, arXiv 2211.01324) place words by adding to
the scores of cross-attention.
"""
