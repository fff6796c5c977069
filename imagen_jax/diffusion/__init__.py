"""The theory of diffusion as pure functions; it knows no network.

    schedules   t -> log-SNR -> alpha, sigma
    process     x_t from x_0, the posterior, x_0 / noise / v
    losses      objectives, min-SNR weights, loss per log-SNR bin
    guidance    classifier-free guidance and thresholds
    samplers    ancestral and DDIM steps, and the loop that runs them

A network enters as a callable, `denoise(x_t, log_snr, x0_previous=None) -> output`.
"""
