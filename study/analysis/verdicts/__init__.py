"""What a study says of published claims: a verdict in a word, with the numbers behind it.

``base`` holds what a verdict is and which runs it compares; each other module judges the claims of
one question. A verdict is computed from pairs of runs that agree in everything but the claimed
cause, seeds included, or from the rows of a probe; a study that lacks what a claim is about gets
the verdict "not testable at this budget".
"""
