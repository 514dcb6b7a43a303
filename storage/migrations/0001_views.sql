-- What people and their tools query: names and seconds in place of numbers and microseconds.
-- The same text makes the same views on SQLite and PostgreSQL; a statement ends with a line `;`.

CREATE VIEW v_jobs AS
SELECT
    j.id AS job_id,
    s.name AS labels,
    j.state,
    j.model,
    j.sampling,
    j.fit,
    j.top_n,
    j.notice,
    j.version,
    (SELECT COUNT(*) FROM job_videos jv WHERE jv.job_id = j.id) AS videos
FROM jobs j
JOIN label_sets s ON s.id = j.label_set_id
;

CREATE VIEW v_labels AS
SELECT
    j.id AS job_id,
    l.position,
    l.name AS label,
    l.prompts,
    l.samples,
    (
        SELECT COUNT(*) FROM label_examples e
        WHERE e.label_set_id = l.label_set_id AND e.label = l.position
    ) AS examples,
    l.threshold,
    l.flag
FROM jobs j
JOIN labels l ON l.label_set_id = j.label_set_id
;

CREATE VIEW v_videos AS
SELECT
    v.id AS video_id,
    v.content_id,
    (
        SELECT f.path FROM files f WHERE f.video_id = v.id ORDER BY f.seen_ms DESC, f.id DESC LIMIT 1
    ) AS path,
    v.recorded_on,
    v.recorded_from,
    CAST(v.duration_us AS DOUBLE PRECISION) / 1000000.0 AS duration_s,
    v.width,
    v.height,
    v.codec,
    v.container
FROM videos v
;

CREATE VIEW v_coverage AS
SELECT
    jv.job_id,
    jv.video_id,
    v.path,
    jv.state,
    jv.reason_kind,
    jv.reason,
    CAST(jv.duration_us AS DOUBLE PRECISION) / 1000000.0 AS duration_s,
    CAST(COALESCE(t.analysed_us, 0) AS DOUBLE PRECISION) / 1000000.0 AS analysed_s,
    CAST(COALESCE(g.gap_us, 0) AS DOUBLE PRECISION) / 1000000.0 AS gaps_s,
    CAST(
        jv.duration_us - COALESCE(t.analysed_us, 0) - COALESCE(g.gap_us, 0) AS DOUBLE PRECISION
    ) / 1000000.0 AS waiting_s,
    COALESCE(g.gaps, 0) AS gaps
FROM job_videos jv
JOIN v_videos v ON v.video_id = jv.video_id
LEFT JOIN (
    SELECT job_id, video_id, SUM(end_us - start_us - gap_us) AS analysed_us
    FROM tasks WHERE state = 'done' GROUP BY job_id, video_id
) t ON t.job_id = jv.job_id AND t.video_id = jv.video_id
LEFT JOIN (
    SELECT job_id, video_id, SUM(end_us - start_us) AS gap_us, COUNT(*) AS gaps
    FROM gaps GROUP BY job_id, video_id
) g ON g.job_id = jv.job_id AND g.video_id = jv.video_id
;

CREATE VIEW v_samples AS
SELECT
    s.job_id,
    s.video_id,
    v.path,
    s.bucket,
    CAST(s.t_us AS DOUBLE PRECISION) / 1000000.0 AS time_s,
    CAST(s.start_us AS DOUBLE PRECISION) / 1000000.0 AS start_s,
    CAST(s.end_us AS DOUBLE PRECISION) / 1000000.0 AS end_s,
    l.name AS label,
    p.confidence,
    j.model,
    j.sampling
FROM samples s
JOIN v_videos v ON v.video_id = s.video_id
JOIN jobs j ON j.id = s.job_id
LEFT JOIN predictions p
    ON p.job_id = s.job_id AND p.video_id = s.video_id AND p.bucket = s.bucket AND p.rank = 0
LEFT JOIN labels l ON l.label_set_id = j.label_set_id AND l.position = p.label
;

CREATE VIEW v_predictions AS
SELECT
    p.job_id,
    p.video_id,
    v.path,
    p.bucket,
    CAST(s.t_us AS DOUBLE PRECISION) / 1000000.0 AS time_s,
    p.rank,
    l.name AS label,
    p.similarity,
    p.confidence,
    j.model,
    j.sampling
FROM predictions p
JOIN samples s ON s.job_id = p.job_id AND s.video_id = p.video_id AND s.bucket = p.bucket
JOIN v_videos v ON v.video_id = p.video_id
JOIN jobs j ON j.id = p.job_id
JOIN labels l ON l.label_set_id = j.label_set_id AND l.position = p.label
;

CREATE VIEW v_scenes AS
SELECT
    c.job_id,
    c.video_id,
    v.path,
    v.recorded_on,
    CAST(c.start_us AS DOUBLE PRECISION) / 1000000.0 AS start_s,
    CAST(c.end_us AS DOUBLE PRECISION) / 1000000.0 AS end_s,
    CAST(c.end_us - c.start_us AS DOUBLE PRECISION) / 1000000.0 AS duration_s,
    COALESCE(l.name, 'unknown') AS label,
    c.confidence,
    c.peak,
    c.samples,
    c.agreeing,
    j.model,
    j.sampling
FROM scenes c
JOIN v_videos v ON v.video_id = c.video_id
JOIN jobs j ON j.id = c.job_id
LEFT JOIN labels l ON l.label_set_id = j.label_set_id AND l.position = c.label
;

CREATE VIEW v_summary AS
SELECT
    jv.job_id,
    jv.video_id,
    v.path,
    v.recorded_on,
    v.recorded_from,
    jv.state,
    CAST(jv.duration_us AS DOUBLE PRECISION) / 1000000.0 AS duration_s,
    CAST(jv.analysed_us AS DOUBLE PRECISION) / 1000000.0 AS analysed_s,
    c.label,
    c.total_s,
    c.total_s / SUM(c.total_s) OVER (PARTITION BY jv.job_id, jv.video_id) AS share,
    c.scenes,
    c.first_s,
    c.last_s,
    c.longest_s,
    c.peak,
    j.model,
    j.sampling
FROM job_videos jv
JOIN jobs j ON j.id = jv.job_id
JOIN v_videos v ON v.video_id = jv.video_id
LEFT JOIN (
    SELECT
        x.job_id,
        x.video_id,
        COALESCE(l.name, 'unknown') AS label,
        CAST(SUM(x.end_us - x.start_us) AS DOUBLE PRECISION) / 1000000.0 AS total_s,
        COUNT(*) AS scenes,
        CAST(MIN(x.start_us) AS DOUBLE PRECISION) / 1000000.0 AS first_s,
        CAST(MAX(x.end_us) AS DOUBLE PRECISION) / 1000000.0 AS last_s,
        CAST(MAX(x.end_us - x.start_us) AS DOUBLE PRECISION) / 1000000.0 AS longest_s,
        MAX(x.peak) AS peak
    FROM scenes x
    JOIN jobs j ON j.id = x.job_id
    LEFT JOIN labels l ON l.label_set_id = j.label_set_id AND l.position = x.label
    GROUP BY x.job_id, x.video_id, x.label, l.name
) c ON c.job_id = jv.job_id AND c.video_id = jv.video_id
;

CREATE VIEW v_flags AS
SELECT
    y.job_id,
    y.video_id,
    v.path,
    v.recorded_on,
    l.name AS label,
    l.flag AS reason,
    l.threshold,
    y.samples,
    CAST(y.first_us AS DOUBLE PRECISION) / 1000000.0 AS first_s,
    CAST(y.last_us AS DOUBLE PRECISION) / 1000000.0 AS last_s,
    y.peak,
    j.model,
    j.sampling
FROM flags y
JOIN v_videos v ON v.video_id = y.video_id
JOIN jobs j ON j.id = y.job_id
JOIN labels l ON l.label_set_id = j.label_set_id AND l.position = y.label
;
