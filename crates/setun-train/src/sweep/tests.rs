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
    assert_eq!(sweep.cells[0].twin, None, "the base was not asked for");
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
fn a_cell_may_learn_from_another_ones_run() {
    let text = "seeds = [5, 6]\n[[cell]]\nname = \"a\"\n\
                [[cell]]\nname = \"d\"\nset = { model.ternary = false }\n\
                [[cell]]\nname = \"t\"\nteacher = \"d\"\nset = { distill.weight = 0.5 }\n";
    let options = SweepOptions {
        cells: vec!["t".to_owned()],
        seeds: vec![7],
        ..SweepOptions::default()
    };
    // There is no such run yet, and the sweep loads: it makes it first.
    let sweep = load("taught", text, &options).unwrap();
    assert_eq!(names(&sweep), ["a", "d", "t"]);
    let teacher = &sweep.cells[2].runs[0].settings.distill.teacher;
    assert!(teacher.as_ref().unwrap().ends_with("nowhere/d/seed-7"));
    let plan = sweep.plan().unwrap();
    assert_eq!(plan.sizes[1].0, plan.sizes[2].0);

    let refused = |text: &str| {
        let error = load("untaught", text, &options).err().unwrap();
        assert!(error.to_string().contains("no cell before it"), "{error}");
    };
    refused(&text.replace("teacher = \"d\"", "teacher = \"e\""));
    refused(&text.replace("teacher = \"d\"", "teacher = \"t\""));
}

#[test]
fn dense_twins_leave_out_what_only_ternary_models_have() {
    let text = "dense_twin = true\n[[cell]]\nname = \"a\"\n\
                set = { model.learned_scales = true, sample.prompts = 0 }\n";
    let set = |key: &str, value: &str| Override {
        key: key.to_owned(),
        value: value.to_owned(),
    };
    let mut options = SweepOptions {
        overrides: vec![set("train.ste", "clipped"), set("train.steps", "9")],
        ..SweepOptions::default()
    };
    let sweep = load("twin", text, &options).unwrap();
    assert_eq!(names(&sweep), ["a", "a-dense"]);
    let [own, twin] = [0, 1].map(|i| &sweep.cells[i].runs[0].settings);
    assert!(own.model.learned_scales && !twin.model.learned_scales);
    assert_ne!(own.train.ste, twin.train.ste);
    assert_eq!((own.train.steps, twin.train.steps), (9, 9));

    let taken = format!("{text}[[cell]]\nname = \"a-dense\"\nset = {{ train.lr = 1e-4 }}\n");
    let error = load("taken", &taken, &options).err().unwrap().to_string();
    assert!(error.contains("a-dense is a cell, and"), "{error}");
    options.seeds = vec![3, 4, 3];
    let error = load("twice", text, &options).err().unwrap().to_string();
    assert!(error.contains("--seeds has 3 twice"), "{error}");
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
