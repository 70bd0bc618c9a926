//! What `.ci/engine` promises the other tests: an engine that answers, and the two images made for them. What
//! runs in containers of these images is the sandbox's tests' business.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/skip.rs"]
#[expect(dead_code, reason = "each test program uses a part of it")]
mod skip;

#[test]
fn the_engine_has_the_images_that_tests_run_in() {
    let Some(host) = engine::host("the_engine_has_the_images_that_tests_run_in") else { return };
    for (image, cmd) in [("coinop-test:busybox", "/bin/sh"), ("coinop-test:scratch", "/say")] {
        let answer = engine::get(&host, &format!("/images/{image}/json")).unwrap();
        assert!(answer.lines().next().unwrap().ends_with("200 OK"), "{image}: {answer}");
        assert!(answer.contains(&format!(r#""Cmd":["{cmd}"]"#)), "{image}: {answer}");
    }
}
