//! Jobs and cron jobs.

use serde_json::{Value, json};

use crate::kinds::at::{At, Errs, IMMUTABLE, same};
use crate::kinds::edit::{child, drop, each_field, empty, flag, put, unset};
use crate::kinds::meta;
use crate::kinds::pod::{self, defaults};
use crate::kinds::row::Row;

/// Names of jobs made by a cron job get eleven characters appended.
const CRON_NAME_MAX_BYTES: usize = 52;
/// Indexed jobs: most completions, and most pods at once.
const MAX_INDEXED_PARALLELISM: i64 = 100_000;
const UID_LABELS: [&str; 2] = ["batch.kubernetes.io/controller-uid", "controller-uid"];
const NAME_LABELS: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];

pub static ROWS: &[Row] = &[
    Row {
        group: "batch",
        resource: "jobs",
        default: |o| {
            default_spec(child(o, "spec"));
            // Labels of the template are the job's own where it has none.
            let labels = o
                .pointer("/spec/template/metadata/labels")
                .filter(|l| l.as_object().is_some_and(|m| !m.is_empty()))
                .cloned();
            if let Some(labels) = labels {
                empty(child(o, "metadata"), "labels", labels);
            }
        },
        create: |_, o| own_pods(o),
        update: |_, _, _| {},
        validate: |o, e| check_job(&o.at("spec"), true, e),
        change: change_job,
        sub_change: |_, new, _, e| {
            let s = new.at("status");
            for f in ["active", "succeeded", "failed", "ready", "terminating"] {
                e.not_negative(&s.at(f));
            }
        },
        status: "{}",
        generation: true,
        labels: &[("status.successful", "/status/succeeded")],
        orphans: true,
        ..Row::BASE
    },
    Row {
        group: "batch",
        resource: "cronjobs",
        default: |o| {
            let spec = child(o, "spec");
            empty(spec, "concurrencyPolicy", "Allow");
            unset(spec, "suspend", false);
            unset(spec, "successfulJobsHistoryLimit", 3);
            unset(spec, "failedJobsHistoryLimit", 1);
            let t = child(spec, "jobTemplate");
            child(t, "metadata");
            let spec = child(t, "spec");
            // Inside a template a job's own defaults stay out; its pods' do not.
            defaults::template(child(spec, "template"));
        },
        validate: check_cron,
        status: "{}",
        generation: true,
        ..Row::BASE
    },
];

fn default_spec(spec: &mut Value) {
    // Neither given: one pod that succeeds is enough.
    if spec.get("completions").is_none_or(Value::is_null) && spec.get("parallelism").is_none_or(Value::is_null) {
        unset(spec, "completions", 1);
    }
    unset(spec, "parallelism", 1);
    if spec.get("backoffLimitPerIndex").is_some_and(|v| !v.is_null()) {
        unset(spec, "backoffLimit", i64::from(i32::MAX));
    }
    unset(spec, "backoffLimit", 6);
    unset(spec, "completionMode", "NonIndexed");
    unset(spec, "suspend", false);
    unset(spec, "manualSelector", false);
    let replace =
        if spec.get("podFailurePolicy").is_some_and(|v| !v.is_null()) { "Failed" } else { "TerminatingOrFailed" };
    unset(spec, "podReplacementPolicy", replace);
    each_field(spec, "podFailurePolicy", |p| {
        crate::kinds::edit::each(p, "rules", |r| {
            crate::kinds::edit::each(r, "onPodConditions", |c| empty(c, "status", "True"));
        });
    });
    defaults::template(child(spec, "template"));
}

/// Marks the pods of a job with the job's UID and selects them by it, unless the user selects by hand.
fn own_pods(o: &mut Value) {
    let (uid, name) = (crate::object::uid(o).to_owned(), crate::object::name(o).to_owned());
    let spec = child(o, "spec");
    if flag(spec, "manualSelector") {
        return;
    }
    {
        let labels = child(child(child(spec, "template"), "metadata"), "labels");
        for l in UID_LABELS {
            put(labels, l, uid.clone());
        }
        for l in NAME_LABELS {
            put(labels, l, name.clone());
        }
    }
    let selector = child(spec, "selector");
    let exact = child(selector, "matchLabels");
    if exact.get(UID_LABELS[0]).is_none() {
        put(exact, UID_LABELS[0], uid);
    }
    // The job carries its template's labels when it has none of its own.
    let labels = spec.pointer("/template/metadata/labels").cloned();
    if let Some(labels) = labels {
        let meta = child(o, "metadata");
        empty(meta, "labels", labels);
    }
}

fn check_cron(o: &At<'_>, e: &mut Errs) {
    let spec = o.at("spec");
    let name = o.at("metadata").at("name");
    if name.len() > CRON_NAME_MAX_BYTES {
        e.invalid(&name, format!("must be no more than {CRON_NAME_MAX_BYTES} characters"));
    }
    let schedule = spec.at("schedule");
    if schedule.is_zero() {
        e.required(&schedule, "");
    } else {
        if let Err(why) = cron(schedule.str()) {
            e.invalid(&schedule, why);
        }
        if schedule.str().contains("TZ") {
            e.invalid(&schedule, "cannot use TZ or CRON_TZ in schedule, use timeZone field instead");
        }
    }
    let zone = spec.at("timeZone");
    if let Some(z) = zone.v.as_str() {
        if z.is_empty() {
            e.invalid(&zone, "timeZone must be nil or non-empty string");
        } else if z.eq_ignore_ascii_case("Local") {
            e.invalid(&zone, "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones");
        } else if jiff::tz::TimeZone::get(z).is_err() {
            e.invalid(&zone, format!("unknown time zone {z}"));
        }
    }
    e.not_negative(&spec.at("startingDeadlineSeconds"));
    e.required_one_of(&spec.at("concurrencyPolicy"), &["Allow", "Forbid", "Replace"]);
    let job = spec.at("jobTemplate").at("spec");
    if job.at("manualSelector").bool() {
        e.not_supported(&job.at("manualSelector"), &["nil", "false"]);
    }
    check_job(&job, false, e);
    e.not_negative(&spec.at("successfulJobsHistoryLimit"));
    e.not_negative(&spec.at("failedJobsHistoryLimit"));
}

/// A cron schedule of five fields, or one of the `@` words; the error is worded as the usual parser's.
pub fn cron(s: &str) -> Result<(), String> {
    if let Some(word) = s.strip_prefix('@') {
        return match word {
            "yearly" | "annually" | "monthly" | "weekly" | "daily" | "midnight" | "hourly" => Ok(()),
            w if w.starts_with("every ") => Ok(()),
            _ => Err(format!("unrecognized descriptor: {s}")),
        };
    }
    let s = s
        .strip_prefix("TZ=")
        .or_else(|| s.strip_prefix("CRON_TZ="))
        .and_then(|r| r.split_once(' '))
        .map_or(s, |(_, r)| r);
    let fields: Vec<&str> = s.split_whitespace().collect();
    if fields.len() != 5 {
        return Err(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), fields.join(" ")));
    }
    const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
    const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
    let bounds: [(u32, u32, &[&str], u32); 5] =
        [(0, 59, &[], 0), (0, 23, &[], 0), (1, 31, &[], 0), (1, 12, &MONTHS, 1), (0, 6, &DAYS, 0)];
    for (field, (low, high, words, base)) in fields.iter().zip(bounds) {
        let number = |t: &str| -> Result<u32, String> {
            let found = words.iter().position(|w| w.eq_ignore_ascii_case(t)).and_then(|i| u32::try_from(i).ok());
            match found {
                Some(i) => Ok(i + base),
                None => t
                    .parse()
                    .map_err(|_| format!("failed to parse int from {t}: strconv.Atoi: parsing {t:?}: invalid syntax")),
            }
        };
        for part in field.split(',') {
            let (range, step) = part.split_once('/').map_or((part, None), |(r, s)| (r, Some(s)));
            let (from, to) = if range == "*" || range == "?" {
                (low, high)
            } else if let Some((a, b)) = range.split_once('-') {
                (number(a)?, number(b)?)
            } else {
                let n = number(range)?;
                (n, if step.is_some() { high } else { n })
            };
            if let Some(step) = step
                && number(step)? == 0
            {
                return Err(format!("step of range should be a positive number: {part}"));
            }
            if from < low {
                return Err(format!("beginning of range ({from}) below minimum ({low}): {part}"));
            }
            if to > high {
                return Err(format!("end of range ({to}) above maximum ({high}): {part}"));
            }
            if from > to {
                return Err(format!("beginning of range ({from}) beyond end of range ({to}): {part}"));
            }
        }
    }
    Ok(())
}

fn check_job(spec: &At<'_>, whole: bool, e: &mut Errs) {
    for f in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        e.not_negative(&spec.at(f));
    }
    let indexed = spec.at("completionMode").str() == "Indexed";
    if spec.at("completionMode").is_set() {
        e.one_of(&spec.at("completionMode"), &["Indexed", "NonIndexed"]);
        if indexed {
            if !spec.at("completions").is_set() {
                e.required(&spec.at("completions"), "when completion mode is Indexed");
            }
            if spec.at("parallelism").int() > MAX_INDEXED_PARALLELISM {
                e.invalid(
                    &spec.at("parallelism"),
                    format!("must be less than or equal to {MAX_INDEXED_PARALLELISM} when completion mode is Indexed"),
                );
            }
        }
    }
    if !indexed {
        for f in ["backoffLimitPerIndex", "maxFailedIndexes"] {
            if spec.at(f).is_set() {
                e.forbidden(&spec.at(f), "requires indexed completion mode");
            }
        }
    }
    if let Some(p) = spec.at("podReplacementPolicy").v.as_str()
        && !["Failed", "TerminatingOrFailed"].contains(&p)
    {
        e.not_supported(&spec.at("podReplacementPolicy"), &["Failed", "TerminatingOrFailed"]);
    }
    failure_policy(spec, e);
    if let Some(by) = spec.at("managedBy").v.as_str() {
        if !by.contains('/') {
            e.invalid(&spec.at("managedBy"), "must be a domain-prefixed path (such as \"acme.io/foo\")");
        }
        if by.len() > 63 {
            e.too_long(&spec.at("managedBy"), 63);
        }
    }
    let t = spec.at("template");
    pod::template::check(&t, e);
    let policy = t.at("spec").at("restartPolicy");
    match policy.str() {
        "Always" | "" => e.required(&policy, "valid values: \"OnFailure\", \"Never\""),
        "OnFailure" | "Never" => {
            if policy.str() == "OnFailure" && spec.at("podFailurePolicy").is_set() {
                e.invalid(&policy, "only \"Never\" is supported when podFailurePolicy is specified");
            }
        }
        _ => e.not_supported(&policy, &["OnFailure", "Never"]),
    }
    if whole {
        let selector = spec.at("selector");
        if !selector.is_set() {
            e.required(&selector, "");
        } else {
            meta::selector(&selector, e);
            let labels = t.at("metadata").at("labels");
            if !meta::selects(selector.v, labels.v) {
                let shown = if labels.is_set() { labels.v.clone() } else { json!({}) };
                e.invalid_value(&labels, shown, "`selector` does not match template `labels`");
            }
        }
    }
}

fn failure_policy(spec: &At<'_>, e: &mut Errs) {
    let rules = spec.at("podFailurePolicy").at("rules");
    if rules.len() > 20 {
        e.too_many(&rules, rules.len(), 20);
    }
    for r in rules.items() {
        e.required_one_of(&r.at("action"), &["Count", "FailIndex", "FailJob", "Ignore"]);
        if r.at("action").str() == "FailIndex" && !spec.at("backoffLimitPerIndex").is_set() {
            e.invalid(&r.at("action"), "requires the backoffLimitPerIndex to be set");
        }
        let codes = r.at("onExitCodes");
        match (codes.is_set(), !r.at("onPodConditions").is_empty()) {
            (true, true) => e.invalid(&r, "specifying both OnExitCodes and OnPodConditions is not supported"),
            (false, false) => e.invalid(&r, "specifying one of OnExitCodes and OnPodConditions is required"),
            _ => {}
        }
        if codes.is_set() {
            e.required_one_of(&codes.at("operator"), &["In", "NotIn"]);
            let values = codes.at("values");
            if values.is_empty() {
                e.invalid(&values, "at least one value is required");
            }
            for (i, v) in values.items().enumerate() {
                if v.int() == 0 && codes.at("operator").str() == "In" {
                    e.invalid(&v, "must not be 0 for the In operator");
                }
                if values.array()[..i].contains(v.v) {
                    e.duplicate(&v);
                }
            }
        }
    }
}

fn change_job(new: &At<'_>, old: &At<'_>, e: &mut Errs) {
    let (n, o) = (new.at("spec"), old.at("spec"));
    let indexed = n.at("completionMode").str() == "Indexed";
    if indexed && n.at("completions").v != o.at("completions").v {
        // An elastic job changes both numbers together.
        if n.at("completions").v != n.at("parallelism").v {
            e.invalid(&n.at("completions"), format!("can only be modified in tandem with {}", "spec.parallelism"));
        }
    } else {
        e.immutable(&n.at("completions"), &o.at("completions"));
    }
    e.immutable(&n.at("selector"), &o.at("selector"));
    let mut was = o.at("template").v.clone();
    // A suspended job that never ran may still be told where to run.
    let never_ran = old.at("status").at("startTime").v.is_null();
    if flag(o.v, "suspend") && never_ran {
        let is = n.at("template").v;
        for path in ["nodeSelector", "tolerations", "affinity", "schedulingGates"] {
            let v = is.pointer(&format!("/spec/{path}")).cloned();
            if let Some(spec) = was.get_mut("spec") {
                match v {
                    Some(v) => put(spec, path, v),
                    None => drop(spec, path),
                }
            }
        }
        for path in ["labels", "annotations"] {
            let v = is.pointer(&format!("/metadata/{path}")).cloned();
            if let Some(m) = was.get_mut("metadata") {
                match v {
                    Some(v) => put(m, path, v),
                    None => drop(m, path),
                }
            }
        }
    }
    if !same(n.at("template").v, &was) {
        e.invalid(&n.at("template"), IMMUTABLE);
    }
    for f in ["completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"] {
        e.immutable(&n.at(f), &o.at(f));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules() {
        for ok in ["* * * * *", "*/5 0-6 1,15 jan-dec mon", "@hourly", "0 0 * * 0", "@every 5m"] {
            assert_eq!(cron(ok), Ok(()), "{ok}");
        }
        assert_eq!(cron("* * *").unwrap_err(), "expected exactly 5 fields, found 3: [* * *]");
        assert_eq!(cron("60 * * * *").unwrap_err(), "end of range (60) above maximum (59): 60");
        assert!(cron("a * * * *").is_err() && cron("@x").is_err() && cron("*/0 * * * *").is_err());
    }

    #[test]
    fn pods_of_a_job_carry_its_uid() {
        let mut o = json!({"metadata": {"name": "j", "uid": "u"}, "spec": {"template": {"spec": {}}}});
        own_pods(&mut o);
        assert_eq!(o["spec"]["selector"]["matchLabels"], json!({"batch.kubernetes.io/controller-uid": "u"}));
        assert_eq!(o["metadata"]["labels"], o["spec"]["template"]["metadata"]["labels"]);
    }
}
