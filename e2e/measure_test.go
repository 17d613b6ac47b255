package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestFirstAnswer runs `make run` as a newcomer does and tells how long the first
// answers took: with an empty Go build cache (in CI, or with RXVISION_MEASURE set),
// and at the second start. It fails when they do not come at all; the times are
// printed, not judged, since machines differ.
func TestFirstAnswer(t *testing.T) {
	ort := ortLibrary(t)
	dir := t.TempDir()
	env := append(os.Environ(), "RXVISION_ORT_LIBRARY="+ort, "RXVISION_DATA_DIR="+filepath.Join(dir, "data"))
	for _, name := range []string{"HTTP", "RPC", "RAFT", "AGENT_HTTP", "GATEWAY"} {
		env = append(env, "RXVISION_"+name+"_ADDR="+freeAddr(t))
	}
	what := "first start, warm build cache"
	if os.Getenv("CI") != "" || os.Getenv("RXVISION_MEASURE") != "" {
		what = "first start, empty build cache"
		env = append(env, "GOCACHE="+filepath.Join(dir, "gocache"))
	}
	measure(t, what, env)
	measure(t, "second start", env)
}

var firstAnswers = regexp.MustCompile(`first answers ([0-9.]+) s after the start`)

func measure(t *testing.T, what string, env []string) {
	t.Helper()
	out := &output{}
	cmd := exec.Command("make", "run")
	cmd.Dir, cmd.Env = root, env
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C reaches the whole group
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	deadline := time.After(15 * time.Minute)
	for firstAnswers.FindString(out.String()) == "" {
		select {
		case err := <-ended:
			t.Fatalf("make run ended: %v\n%s", err, out)
		case <-deadline:
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT)
			t.Fatalf("no answer within 15 minutes:\n%s", out)
		case <-time.After(20 * time.Millisecond):
		}
	}
	took := time.Since(began)
	fmt.Printf("MEASURED make run, %s: %.1f s to the first answers, of which the platform %s s\n", what, took.Seconds(), firstAnswers.FindStringSubmatch(out.String())[1])
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil && !strings.Contains(out.String(), "jobs, models and history stay") {
		t.Errorf("after Ctrl-C: %v\n%s", err, out)
	}
}
