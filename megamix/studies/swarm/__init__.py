"""Mixtures from a swarm of proxy runs: sample mixtures, train a small model on each, fit a law, propose the best.

    priors -> generate -> run -> collect -> fit -> propose -> mixture: {from_swarm: DIR}

Source: Olmix, Chen et al., arXiv 2602.12237.

    all of it   steps, job; cli
    runs        priors, sampler, generate, members, run, collect
    fit         tables, selection, law, huber (the solver), regressors, quality, fit, fitted (what a fit leaves),
                fit_plots, fit_command, olmix (its configs)
    proposal    question, solve (the convex problem), search, propose, confidence, proposal_report, proposal_file
    updates     update, reuse (the maths)
    options     job_config, generate_config, fit_config, propose_config, update_config
"""
