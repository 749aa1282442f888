//! What the system says of this process, read when somebody asks. Named as Prometheus' own libraries name it.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// USER_HZ, in which /proc tells times, is 100 on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;
/// Fields of /proc/self/stat after the name, which may hold anything: utime, stime, starttime.
const UTIME: usize = 11;
const STIME: usize = 12;
const STARTTIME: usize = 19;

/// Where there is no /proc, nothing is said.
#[derive(Debug)]
pub struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        if let Some(seconds) = ticks(&stat, UTIME).zip(ticks(&stat, STIME)).map(|(user, system)| user + system) {
            let seconds = ConstCounter::new(seconds);
            let help = "time on processors, of this process and of the system for it";
            seconds.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, seconds.metric_type())?)?;
        }
        let started = ticks(&stat, STARTTIME).zip(booted()).map(|(after, booted)| booted + after);
        for (name, help, value) in [
            ("process_resident_memory_bytes", "memory of this process that is not swapped out", resident()),
            ("process_open_fds", "files and sockets that are open", open_files()),
            ("process_max_fds", "files and sockets that may be open", max_files()),
            ("process_start_time_seconds", "start of this process, in seconds since 1970", started),
        ] {
            if let Some(value) = value {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
            }
        }
        Ok(())
    }
}

/// A field of /proc/self/stat, in seconds.
fn ticks(stat: &str, field: usize) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    let ticks: f64 = after_name.split(' ').nth(field)?.parse().ok()?;
    Some(ticks / TICKS_PER_SECOND)
}

fn booted() -> Option<f64> {
    word_after(&fs::read_to_string("/proc/stat").ok()?, "btime")
}

fn resident() -> Option<f64> {
    word_after(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:").map(|kib| kib * 1024.0)
}

/// Since Linux 6.2 the directory's length says how many; before, they have to be listed.
fn open_files() -> Option<f64> {
    let length = fs::metadata("/proc/self/fd").ok()?.len();
    let open = if length > 0 { length } else { fs::read_dir("/proc/self/fd").ok()?.count() as u64 };
    Some(open as f64)
}

fn max_files() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    word_after(&limits, "Max open files")
}

/// The number that follows the line's name.
fn word_after(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    fn told(name: &str) -> f64 {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        word_after(&text, &format!("{name} ")).unwrap_or_else(|| panic!("{name} in\n{text}"))
    }

    #[test]
    fn files_that_are_opened_are_counted() {
        const MORE: usize = 100;
        let before = told("process_open_fds");
        let open: Vec<_> = (0..MORE).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let with_them = told("process_open_fds");
        assert!(with_them - before >= open.len() as f64 / 2.0, "{before}, then {with_them}"); // other tests close some
        assert!(with_them < told("process_max_fds"));
    }

    #[test]
    fn memory_that_is_used_and_time_that_is_spent_show() {
        let (memory, spent) = (told("process_resident_memory_bytes"), told("process_cpu_seconds_total"));
        let mut used = vec![1u8; 64 << 20];
        while told("process_cpu_seconds_total") <= spent {
            used.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(3));
        }
        assert!(told("process_resident_memory_bytes") > memory + used.len() as f64 / 2.0);
        assert!(told("process_start_time_seconds") > 1_600_000_000.0);
    }
}
