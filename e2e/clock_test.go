package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A clock that jumps cannot be had from outside a Go program: it asks the kernel
// without a call that could be caught, and the machine's own clock is not ours to
// turn. So the fault suite builds the program with an overlay, in which time.Now
// adds what a file says. The product's source knows nothing of it.

// clockVariable names the file with the seconds to add.
const clockVariable = "RXVISION_TEST_CLOCK"

const clockReader = `package main

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

func init() {
	file := os.Getenv("` + clockVariable + `")
	if file == "" {
		return
	}
	look := func() {
		if b, err := os.ReadFile(file); err == nil {
			if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil {
				atomic.StoreInt64(&time.ClockJump, n)
			}
		}
	}
	look()
	go func() {
		for ; ; time.Sleep(20 * time.Millisecond) {
			look()
		}
	}()
}
`

// buildWithClock builds rxvision with a clock that can be turned, which takes
// minutes when nothing is cached: every package is built anew.
func buildWithClock(t testing.TB) string {
	t.Helper()
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	original := filepath.Join(strings.TrimSpace(string(goroot)), "src/time/time.go")
	src, err := os.ReadFile(original)
	if err != nil {
		t.Fatal(err)
	}
	const now = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	if bytes.Count(src, []byte(now)) != 1 {
		t.Skip("time.Now of this Go is not the one that can be patched: no clock will jump")
	}
	src = bytes.Replace(src, []byte(now), []byte(now+"\tsec += atomic.LoadInt64(&ClockJump)\n"), 1)
	src = bytes.Replace(src, []byte("import (\n"), []byte("import (\n\t\"sync/atomic\"\n"), 1)
	src = append(src, "\n// ClockJump is added to the seconds of every wall clock reading.\nvar ClockJump int64\n"...)
	dir, err := os.MkdirTemp("", "rxvision-clock-") // one path for good would keep the build cached
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	overlay := map[string]map[string]string{"Replace": {
		original: filepath.Join(dir, "time.go"),
		filepath.Join(root, "cmd/rxvision/zz_clock.go"): filepath.Join(dir, "clock.go"),
	}}
	list, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"time.go": src, "clock.go": []byte(clockReader), "overlay.json": list} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(dir, "rxvision")
	build := exec.Command("go", "build", "-race", "-overlay", filepath.Join(dir, "overlay.json"), "-o", out, "./cmd/rxvision")
	build.Dir = root
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build with a clock that jumps: %v\n%s", err, text)
	}
	return out
}

// maxJump is how far clocks jump at most, either way.
const maxJump = time.Hour

// clock is the file that says how wrong a server's clock is.
type clock string

func (c clock) jump(t testing.TB, d time.Duration) {
	if err := os.WriteFile(string(c)+".new", []byte(strconv.FormatInt(int64(d/time.Second), 10)), 0o600); err != nil {
		t.Error(err)
	}
	if err := os.Rename(string(c)+".new", string(c)); err != nil {
		t.Error(err)
	}
}

func (c clock) env() string { return fmt.Sprintf("%s=%s", clockVariable, string(c)) }
