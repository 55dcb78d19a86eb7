"""Which columns every table has, and what is in them."""

from study.analysis.names import ARM


def _names(text: str) -> list[str]:
    """Column names written as words; {arm} stands for the columns that say which arm a row is."""
    return text.format(arm=" ".join(ARM)).split()


COLUMNS = {
    "runs": _names("""
        run display {arm} family method target_kind conditional precision
        seed data_seed init_seed noise_seed
        dataset dataset_note status step steps reason last_finite_step last_finite_loss
        last_finite_grad_norm final_loss parameters skips skip_factors images_seen generation
        evaluation measurement images sampling_seed sampler nfe git_commit git_changed device
        torch_version versions"""),
    "metrics": _names("""
        run {arm} seed status metric base extractor images value identity note"""),
    "summary": _names("""
        {arm} metric identity better n mean standard_deviation min_of_n max_of_n ci_low ci_high
        n_runs n_diverged n_missing n_not_measured n_otherwise note"""),
    "comparisons": _names("""
        {arm} baseline metric identity better n_pairs n_diverged_pairs mean_difference ci_low
        ci_high p_value p_holm tests_in_family detectable_difference verdict note"""),
    "measurements": _names("""
        run {arm} dataset seed status protocol measurement step last best images_seen weights
        sampler sampler_steps nfe guidance_kind guidance_scale labels sampling_seed images extractor
        metric base value spread identity note"""),
    "curves": _names("""
        {arm} dataset protocol step last best images_seen weights sampler sampler_steps nfe
        guidance_kind guidance_scale labels images extractor metric base identity better kappa
        reference_batch macs parameters sampling_seeds n mean ci_low ci_high n_runs n_diverged
        n_missing n_not_measured n_otherwise"""),
    "points": _names("""
        point metric base better reference reference_sha256 extractor extractor_sha256 images
        value"""),
    "cost": _names("""
        run {arm} seed status device parameters skips steps images_seen nfe train_seconds
        train_images_per_second median_step_seconds train_peak_memory_mib generated_images
        generate_seconds generate_images_per_second generate_peak_memory_mib"""),
    "dynamics": _names("run quantity where step value raw minimum maximum points"),
    "oscillation": _names("""
        run quantity where window_first_step window_last_step points level oscillation"""),
    "measures": _names("run {arm} seed status measure value better note"),
    "stability": _names("""
        {arm} measure better against baseline n mean mean_low mean_high n_runs n_diverged n_missing
        test n_pairs n_diverged_pairs factor factor_low factor_high p_value p_holm tests_in_family
        detectable_factor verdict note"""),
    "stability_pairs": _names("""
        run {arm} seed status measure better against baseline baseline_run seeds factor note"""),
    "qc": _names("severity check run detail"),
}
INTEGERS = set(
    _names("""
        data_seed init_seed noise_seed step steps last_finite_step parameters skips images_seen
        images sampling_seed nfe n n_runs n_diverged n_missing n_not_measured n_otherwise n_pairs
        n_diverged_pairs sampler_steps sampling_seeds reference_batch
        tests_in_family points window_first_step window_last_step generated_images""")
)
NUMBERS = set(
    _names("""
        last_finite_loss last_finite_grad_norm final_loss value raw minimum maximum mean min_of_n
        max_of_n standard_deviation ci_low ci_high mean_low mean_high mean_difference p_value
        p_holm detectable_difference factor factor_low factor_high detectable_factor
        train_seconds train_images_per_second median_step_seconds train_peak_memory_mib
        generate_seconds generate_images_per_second generate_peak_memory_mib level oscillation
        spread guidance_scale kappa macs""")
)
TABLES = (
    *("runs", "metrics", "identities", "summary", "comparisons", "measurements", "curves"),
    *("points", "cost", "oscillation", "measures", "stability", "stability_pairs", "qc"),
)
