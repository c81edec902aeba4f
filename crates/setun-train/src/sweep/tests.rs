//! Tests of the planning of sweeps; `crates/setun/tests/sweep.rs` runs some.

use super::*;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The sweep that `text` describes, over the tiny recipe.
fn load(name: &str, text: &str, options: &SweepOptions) -> Result<Sweep, TrainError> {
    let recipe = workspace().join("recipes/tiny.toml");
    let name = format!("setun-sweep-{}-{name}.toml", std::process::id());
    let path = std::env::temp_dir().join(name);
    let text = format!("recipe = {recipe:?}\noutput = \"nowhere\"\n{text}");
    std::fs::write(&path, text).unwrap();
    let sweep = Sweep::load(&path, options);
    std::fs::remove_file(&path).unwrap();
    sweep
}

fn names(sweep: &Sweep) -> Vec<&str> {
    sweep.cells.iter().map(|cell| cell.name.as_str()).collect()
}

#[test]
fn a_grid_has_every_combination_and_twins_are_shared() {
    let text = "dense_twin = true\n[grid]\n\"train.lr\" = [1e-3, 2e-3]\n\
                model.group_size = [32, 64]\n";
    let sweep = load("grid", text, &SweepOptions::default()).unwrap();
    assert_eq!(
        names(&sweep),
        [
            "lr-0.001_group_size-32",
            "lr-0.001_group_size-64",
            "lr-0.002_group_size-32",
            "lr-0.002_group_size-64",
            "lr-0.001_group_size-32-dense",
            "lr-0.002_group_size-32-dense",
        ]
    );
    // A dense model has no groups, so both sizes have the same twin.
    let twins: Vec<_> = sweep.cells.iter().map(|cell| cell.twin).collect();
    assert_eq!(twins, [Some(4), Some(4), Some(5), Some(5), None, None]);
    assert_eq!(sweep.seeds, [1], "the recipe's");
    let dense = &sweep.cells[5].runs[0].settings;
    assert!(!dense.model.ternary && dense.train.lr == 2e-3);
    assert!(dense.export.formats.iter().all(|f| f.holds_floats()));
}

#[test]
fn chosen_cells_keep_their_base_and_twin() {
    let text = "base = \"a\"\ndense_twin = \"d\"\nseeds = [5]\n\
                [[cell]]\nname = \"a\"\n[[cell]]\nname = \"b\"\nset = { train.steps = 7 }\n\
                [[cell]]\nname = \"c\"\ndense_twin = \"x\"\n\
                [[cell]]\nname = \"d\"\nset = { model.ternary = false }\n\
                [[cell]]\nname = \"x\"\nset = { model.ternary = false }\n";
    let options = SweepOptions {
        cells: vec!["b".to_owned()],
        seeds: vec![8, 9],
        ..SweepOptions::default()
    };
    let error = load("seeds", text, &options).err().unwrap().to_string();
    assert!(error.contains("data.valid is empty"), "{error}");
    let options = SweepOptions {
        seeds: vec![8],
        ..options
    };
    let sweep = load("chosen", text, &options).unwrap();
    assert_eq!(names(&sweep), ["a", "b", "d"]);
    assert_eq!((sweep.base, sweep.cells[1].twin), (0, Some(2)));
    let settings = &sweep.cells[1].runs[0].settings;
    assert_eq!((settings.train.steps, settings.run.seed), (7, 8));
    assert!(settings.output().ends_with("nowhere/b/seed-8"));
    let options = SweepOptions {
        cells: vec!["e".to_owned()],
        ..options
    };
    let error = load("unknown", text, &options).err().unwrap().to_string();
    assert!(
        error.contains("no cell e") && error.contains("a, b, c, d, x"),
        "{error}"
    );
}

#[test]
fn shipped_sweeps_load() {
    let folder = workspace().join("bench/recipe");
    let files = std::fs::read_dir(&folder).unwrap();
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "toml"));
    files.retain(|file| !file.ends_with("base.toml"));
    assert!(files.len() >= 6, "{files:?}");
    // A directory of its own: the study may be under way in the usual one.
    let options = SweepOptions {
        output: Some(std::env::temp_dir().join("setun-no-study")),
        ..SweepOptions::default()
    };
    for file in files {
        let sweep = Sweep::load(&file, &options);
        let sweep = sweep.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert!(sweep.cells.len() >= 2, "{}", file.display());
    }
}
