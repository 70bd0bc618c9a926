fn main() {
    let dir = std::path::PathBuf::from(std::env::args().nth(1).unwrap());
    let rounds = std::env::args().nth(2).unwrap().parse().unwrap();
    let helper = std::env::args().nth(3).unwrap().into();
    let r = coinop::bench::tti::run(&coinop::bench::tti::Options {
        rounds,
        helper: Some(helper),
        state_dir: dir,
    })
    .unwrap();
    println!("{}", serde_json::to_string_pretty(&r).unwrap());
}
