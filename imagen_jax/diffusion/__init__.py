"""The theory of diffusion as pure functions; it knows no network and no configuration of one.

    process     noise levels, predictions, the protocol of a noise process, and what follows for all
    vp          the variance-preserving process, by schedule and objective
    edm         the process of EDM, and its preconditioning
    schedules   t -> log-SNR -> alpha, sigma
    losses      elementwise losses, min-SNR weights, loss per log-SNR bin
    guidance    classifier-free guidance and thresholds
    samplers    a table of step functions, and the loop that runs them; heun: one more of them

A network enters as a callable, `network(x, level) -> raw answer`.
"""
