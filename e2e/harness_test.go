package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// nomadVersion is the client that the platform must satisfy unchanged.
const nomadVersion = "1.11.1"

var (
	root   string // of the module
	binary string // rxvision, built with the race detector
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	wd, err := os.Getwd()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	root = filepath.Dir(wd)
	dir, err := os.MkdirTemp("", "rxvision-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "rxvision")
	build := exec.Command("go", "build", "-race", "-o", binary, "./cmd/rxvision")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build rxvision: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// ortLibrary is ONNX Runtime for the workers; without it nothing can be served.
func ortLibrary(t testing.TB) string {
	for _, p := range []string{os.Getenv("RXVISION_ORT_LIBRARY"), filepath.Join(root, "out/lib/libonnxruntime.so.1")} {
		if p == "" {
			continue
		}
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	t.Skip("ONNX Runtime's library is missing: run `make ort`, or set RXVISION_ORT_LIBRARY")
	return ""
}

// nomadBinary is the real nomad at the pinned version.
func nomadBinary(t testing.TB) string {
	candidates := []string{filepath.Join(root, "out/tools/nomad-"+nomadVersion+"/nomad")}
	if p, err := exec.LookPath("nomad"); err == nil {
		candidates = append([]string{p}, candidates...)
	}
	for _, p := range candidates {
		out, err := exec.Command(p, "version").Output()
		if err == nil && strings.Contains(string(out), nomadVersion) {
			return p
		}
	}
	t.Skipf("nomad %s is missing: run `make nomad`", nomadVersion)
	return ""
}

// platform is one `rxvision dev` on a data folder and ports of its own. It can
// be started again after an end of any kind.
type platform struct {
	t     testing.TB
	data  string
	extra []string // more flags of dev
	env   []string
	addrs map[string]string // flag → address

	cmd *exec.Cmd
	out *output
}

// output collects what a process prints, readable while it runs.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// newPlatform prepares a platform; start starts it. At the end of the test it is
// stopped, and nothing of it may run on.
func newPlatform(t testing.TB, extra ...string) *platform {
	p := &platform{t: t, data: filepath.Join(t.TempDir(), "data"), extra: extra, addrs: map[string]string{}}
	for _, flag := range []string{"http-addr", "rpc-addr", "raft-addr", "agent-http-addr", "gateway-addr"} {
		p.addrs[flag] = freeAddr(t)
	}
	t.Cleanup(func() {
		p.kill()
		stop := exec.Command(binary, append([]string{"dev", "--stop", "--data-dir", p.data}, p.flags()...)...)
		if out, err := stop.CombinedOutput(); err != nil {
			t.Errorf("dev --stop: %v\n%s", err, out)
		}
		if left := p.processes(); len(left) > 0 {
			t.Errorf("processes are left behind: %v", left)
			for pid := range left {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		if t.Failed() {
			t.Logf("dev printed:\n%s", p.printed())
			logs, _ := filepath.Glob(filepath.Join(p.data, "dev", "*.stderr.*"))
			for _, l := range logs {
				t.Logf("%s:\n%s", filepath.Base(l), tail(l, 6000))
			}
		}
	})
	return p
}

func (p *platform) printed() string {
	if p.out == nil {
		return ""
	}
	return p.out.String()
}

func tail(path string, n int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}

// freeAddr finds a port that is free now, below the range that tasks get theirs from.
func freeAddr(t testing.TB) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (p *platform) flags() []string {
	var out []string
	for f, a := range p.addrs {
		out = append(out, "--"+f, a)
	}
	return append(out, p.extra...)
}

func (p *platform) http() string    { return "http://" + p.addrs["http-addr"] }
func (p *platform) gateway() string { return "http://" + p.addrs["gateway-addr"] }

// launch starts dev without waiting.
func (p *platform) launch() {
	p.t.Helper()
	p.out = &output{}
	p.cmd = exec.Command(binary, append([]string{"dev", "--data-dir", p.data}, p.flags()...)...)
	p.cmd.Dir = root
	p.cmd.Env = append(os.Environ(), "RXVISION_ORT_LIBRARY="+ortLibrary(p.t), "GORACE=halt_on_error=1 exitcode=66")
	p.cmd.Env = append(p.cmd.Env, p.env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

// start starts dev and waits until it says that all is up.
func (p *platform) start() {
	p.t.Helper()
	p.launch()
	p.await("dev is up", func() bool { return strings.Contains(p.out.String(), "Ctrl-C ends everything.") })
}

// await waits for a condition; dev must live meanwhile.
func (p *platform) await(what string, ok func() bool) {
	p.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			p.t.Fatalf("%s: not within two minutes", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// interrupt sends Ctrl-C and waits for the end.
func (p *platform) interrupt() error {
	p.t.Helper()
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		p.t.Fatal(err)
	}
	err := p.cmd.Wait()
	p.cmd = nil
	return err
}

// kill ends the supervisor as kill -9 does; its children run on.
func (p *platform) kill() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	p.cmd = nil
}

// processes finds what runs on this platform's data folder: pid → command line.
func (p *platform) processes() map[int]string {
	out := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || !bytes.Contains(b, []byte(p.data)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(d))
		if err == nil && (p.cmd == nil || pid != p.cmd.Process.Pid) {
			out[pid] = strings.ReplaceAll(strings.TrimRight(string(b), "\x00"), "\x00", " ")
		}
	}
	return out
}

// result is what a command did.
type result struct {
	text string // stdout and stderr
	code int
}

func (r result) has(t testing.TB, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(r.text, part) {
			t.Errorf("%q is missing in:\n%s", part, r.text)
		}
	}
}

func (r result) matches(t testing.TB, exprs ...string) {
	t.Helper()
	for _, e := range exprs {
		if !regexp.MustCompile("(?m)" + e).MatchString(r.text) {
			t.Errorf("nothing matches %q in:\n%s", e, r.text)
		}
	}
}

// command runs a program to its end with the platform's addresses set.
func (p *platform) command(program string, args ...string) result {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "NOMAD_ADDR="+p.http(), "RXVISION_GATEWAY="+p.addrs["gateway-addr"], "NOMAD_CLI_NO_COLOR=1",
		"RXVISION_ORT_LIBRARY="+ortLibrary(p.t), "COLUMNS=200")
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		p.t.Fatalf("%s %s: %v", program, strings.Join(args, " "), err)
	}
	r := result{string(b), cmd.ProcessState.ExitCode()}
	if strings.Contains(r.text, "runtime error") || strings.Contains(r.text, "panic:") {
		p.t.Fatalf("%s %s crashed:\n%s", program, strings.Join(args, " "), r.text)
	}
	return r
}

// nomad runs the real nomad; code is the wanted exit code.
func (p *platform) nomad(code int, args ...string) result {
	p.t.Helper()
	r := p.command(nomadBinary(p.t), args...)
	if r.code != code {
		p.t.Fatalf("nomad %s: exit code %d, want %d:\n%s", strings.Join(args, " "), r.code, code, r.text)
	}
	return r
}

// rxvision runs our own binary.
func (p *platform) rxvision(code int, args ...string) result {
	p.t.Helper()
	r := p.command(binary, args...)
	if r.code != code {
		p.t.Fatalf("rxvision %s: exit code %d, want %d:\n%s", strings.Join(args, " "), r.code, code, r.text)
	}
	return r
}

// serveFashion pushes the sample model and runs its job until it is healthy.
func (p *platform) serveFashion() {
	p.t.Helper()
	p.rxvision(0, "model", "push", "fashion", "models/fashion/fashion.onnx")
	p.rxvision(0, "job", "run", "jobs/examples/fashion.nomad.hcl")
}

// get reads JSON from the HTTP API.
func (p *platform) get(path string, out any) {
	p.t.Helper()
	resp, err := http.Get(p.http() + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		p.t.Fatalf("GET %s: %s %s %v", path, resp.Status, b, err)
	}
	if err := json.Unmarshal(b, out); err != nil {
		p.t.Fatalf("GET %s: %v in %s", path, err, b)
	}
}

// send makes one request with a body and gives status and answer.
func send(method, url string, header map[string]string, body io.Reader) (int, string, error) {
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		return 0, "", err
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// write puts a file into the test's folder.
func write(t testing.TB, name, text string) string {
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
