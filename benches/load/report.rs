//! Two contenders of one run, as a ratio.

use serde_json::Value;
use serde_json::json;

/// The middle of some figures, and how far they go.
pub struct Figures {
    pub median: f64,
    pub lowest: f64,
    pub highest: f64,
}

impl Figures {
    pub fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_unstable_by(f64::total_cmp);
        Self { median: figures[figures.len() / 2], lowest: figures[0], highest: figures[figures.len() - 1] }
    }
}

/// What was measured round by round, and what has to come of it. `least` and `aim` are upper bounds where less is better.
pub struct Row {
    pub key: &'static str,
    pub what: &'static str,
    pub against: &'static str,
    pub unit: &'static str,
    pub ours: Vec<f64>,
    pub theirs: Vec<f64>,
    pub least: f64,
    pub aim: f64,
    pub less_is_better: bool,
}

impl Row {
    /// More is better. A bound of 0 is none.
    pub fn new(key: &'static str, (what, against): (&'static str, &'static str), (least, aim): (f64, f64)) -> Self {
        let (unit, ours, theirs) = ("/s", Vec::new(), Vec::new());
        Self { key, what, against, unit, ours, theirs, least, aim, less_is_better: false }
    }

    pub fn in_unit(mut self, unit: &'static str) -> Self {
        self.unit = unit;
        self
    }

    pub fn less_is_better(mut self, unit: &'static str) -> Self {
        (self.less_is_better, self.unit) = (true, unit);
        self
    }

    /// A figure that is compared with nothing. Less is better.
    pub fn absolute(key: &'static str, what: &'static str, unit: &'static str, bounds: (f64, f64)) -> Self {
        Self::new(key, (what, ""), bounds).less_is_better(unit)
    }

    pub fn add_absolute(&mut self, ours: f64) {
        self.add(ours, 1.0);
    }

    pub fn add(&mut self, ours: f64, theirs: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }

    /// Round by round, so that what slowed the machine down slowed down both.
    fn ratio(&self) -> Figures {
        Figures::of(self.ours.iter().zip(&self.theirs).map(|(ours, theirs)| ours / theirs).collect())
    }

    /// Below 0.9 of the other, and no round of ours as good as the worst of theirs: more than noise.
    pub fn has_fallen(&self) -> bool {
        const KEPT: f64 = 0.9;
        let (ours, theirs, ratio) = (Figures::of(self.ours.clone()), Figures::of(self.theirs.clone()), self.ratio().median);
        match self.less_is_better {
            true => ratio > 1.0 / KEPT && ours.lowest > theirs.highest,
            false => ratio < KEPT && ours.highest < theirs.lowest,
        }
    }

    fn verdict(&self) -> &'static str {
        let reaches = |bound: f64| if self.less_is_better { self.ratio().median <= bound } else { self.ratio().median >= bound };
        match () {
            () if self.least == 0.0 => "",
            () if reaches(self.aim) => "aim",
            () if reaches(self.least) => "enough",
            () => "MISSED",
        }
    }
}

/// Prints the table, and one line for machines.
pub fn print(bench: &str, rows: &[Row], more: &Value) {
    println!("| what | against | ratio (lowest - highest) | at least, aim | | medians |");
    println!("|---|---|---|---|---|---|");
    let mut medians = json!({ "bench": bench });
    for row in rows {
        let (ratio, ours, theirs) = (row.ratio(), Figures::of(row.ours.clone()), Figures::of(row.theirs.clone()));
        let bounds = if row.least == 0.0 { String::new() } else { format!("{:.2}, {:.2}", row.least, row.aim) };
        let (x, medians_of_both) = match row.against {
            "" => (format!(" {}", row.unit), String::new()),
            _ => ("x".to_owned(), format!("{} / {} {}", short(ours.median), short(theirs.median), row.unit)),
        };
        println!(
            "| {} | {} | **{}{x}** ({} - {}) | {bounds} | {} | {medians_of_both} |",
            row.what,
            row.against,
            short(ratio.median),
            short(ratio.lowest),
            short(ratio.highest),
            row.verdict()
        );
        medians[row.key] = json!({
            "ratio": rounded(ratio.median), "lowest": rounded(ratio.lowest), "highest": rounded(ratio.highest),
            "ours": rounded(ours.median), "theirs": rounded(theirs.median),
        });
    }
    medians["more"] = more.clone();
    println!("{medians}");
}

fn short(figure: f64) -> String {
    if figure < 100.0 { format!("{figure:.2}") } else { format!("{figure:.0}") }
}

fn rounded(ratio: f64) -> f64 {
    (ratio * 1_000.0).round() / 1_000.0
}
