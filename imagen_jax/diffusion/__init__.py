"""The theory of diffusion as pure functions, independent of any network and its configuration.

    process     noise levels, predictions, the protocol of noise processes, and what they share
    vp          the variance-preserving process, by schedule and objective
    edm         the process of EDM, and its preconditioning
    schedules   t -> log-SNR -> alpha, sigma
    losses      elementwise losses, min-SNR weights, loss per log-SNR bin
    guidance    classifier-free guidance and thresholds
    samplers    a table of step functions, and the loop that runs them; heun: one more of them

A network is passed as a callable, `network(x, level) -> raw output`.
"""
