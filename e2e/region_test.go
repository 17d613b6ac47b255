package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Ports of every server; each has a host of its own.
const (
	regionHTTP = 7646
	regionRPC  = 7647
	regionRaft = 7648
)

// region is several servers as operators run them: TLS, ACL, one host each. It has
// no agents; a test starts what it needs with agent or benchNodes.
type region struct {
	t       testing.TB
	dir     string // certificates, data folders, output
	net     network
	servers []*serverProcess
	http    *http.Client // trusts the region's CA
	token   string       // of management
	program string       // that the servers run
	env     []string     // of commands
}

// serverProcess is one server, running or not.
type serverProcess struct {
	region *region
	i      int
	name   string
	data   string
	flags  []string
	env    []string
	cmd    *exec.Cmd
	out    *output       // of its last run
	runs   []*output     // of all
	dead   chan struct{} // closed when the process ended; nil before the first start
	err    error         // how it ended
}

// newRegion prepares servers for n hosts of which the first expect begin the
// region; start starts them.
func newRegion(t testing.TB, n, expect int, flags ...string) *region {
	t.Helper()
	return newRegionOn(t, newNetwork(t, n, regionRaft), binary, nil, n, expect, flags...)
}

// newRegionOn prepares servers that run a program on the first n hosts of a
// network; env is for the commands that make their certificates.
func newRegionOn(t testing.TB, on network, program string, env []string, n, expect int, flags ...string) *region {
	t.Helper()
	r := &region{t: t, dir: t.TempDir(), program: program, env: env, net: on}
	r.run("tls", "ca", "create")
	for i := range n {
		name := fmt.Sprintf("s%d", i+1)
		r.run("tls", "cert", "create", "--server", "--name", name, "--additional-ip", r.net.ip(i), "--additional-ip", r.net.advertised(i))
		s := &serverProcess{region: r, i: i, name: name, data: filepath.Join(r.dir, name)}
		s.flags = append([]string{
			"--name", name, "--data-dir", s.data, "--bootstrap-expect", strconv.Itoa(expect),
			"--http-addr", r.net.ip(i) + ":" + strconv.Itoa(regionHTTP),
			"--rpc-addr", r.net.ip(i) + ":" + strconv.Itoa(regionRPC),
			"--raft-addr", r.net.ip(i) + ":" + strconv.Itoa(regionRaft),
			"--raft-advertise", r.net.advertised(i) + ":" + strconv.Itoa(regionRaft),
			"--tls-ca", r.path("ca.pem"), "--tls-cert", r.path(name + ".pem"), "--tls-key", r.path(name + "-key.pem"),
			"--node-ca-cert", r.path("node-ca.pem"), "--node-ca-key", r.path("node-ca-key.pem"),
		}, flags...)
		for j := range n {
			s.flags = append(s.flags, "--retry-join", r.net.advertised(j)+":"+strconv.Itoa(regionRaft))
		}
		r.servers = append(r.servers, s)
	}
	r.env = nil
	ca, err := os.ReadFile(r.path("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		t.Fatal("ca.pem holds no certificate")
	}
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 64,
		DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
	}
	r.http = &http.Client{Transport: transport, Timeout: 20 * time.Second}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		for _, s := range r.servers {
			s.kill()
		}
		if t.Failed() {
			for _, s := range r.servers {
				s.tell()
			}
		}
	})
	return r
}

func (r *region) path(name string) string { return filepath.Join(r.dir, name) }

// run runs rxvision to its end in the region's folder, which must succeed.
func (r *region) run(args ...string) string {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.program, args...)
	cmd.Dir, cmd.Env = r.dir, append(append(os.Environ(), r.clientEnv(0)...), r.env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("rxvision %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// clientEnv points clients at server i.
func (r *region) clientEnv(i int) []string {
	return []string{
		"NOMAD_ADDR=" + r.url(i), "NOMAD_CACERT=" + r.path("ca.pem"), "NOMAD_TOKEN=" + r.token, "NOMAD_CLI_NO_COLOR=1", "COLUMNS=200",
	}
}

// nomad runs the real nomad against server i; code is the wanted exit code.
func (r *region) nomad(i, code int, args ...string) result {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, nomadBinary(r.t), args...)
	cmd.Dir, cmd.Env = root, append(os.Environ(), r.clientEnv(i)...)
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatalf("nomad %s: %v", strings.Join(args, " "), err)
	}
	res := result{string(b), cmd.ProcessState.ExitCode()}
	if res.code != code {
		r.t.Fatalf("nomad %s at s%d: exit code %d, want %d:\n%s", strings.Join(args, " "), i+1, res.code, code, res.text)
	}
	return res
}

func (r *region) url(i int) string {
	return "https://" + net.JoinHostPort(r.net.ip(i), strconv.Itoa(regionHTTP))
}

// start starts servers (all, when none is named) and waits for a leader that all of them know.
func (r *region) start(which ...int) {
	r.t.Helper()
	if len(which) == 0 {
		for i := range r.servers {
			which = append(which, i)
		}
	}
	for _, i := range which {
		r.servers[i].start()
	}
	for _, i := range which {
		r.await(fmt.Sprintf("s%d knows a leader", i+1), func() bool { return r.leaderOf(i) != "" })
	}
}

// bootstrapACL makes the management token.
func (r *region) bootstrapACL() {
	r.t.Helper()
	var token struct{ SecretID string }
	r.await("ACL bootstrap", func() bool {
		status, body, err := r.call(http.MethodPut, 0, "/v1/acl/bootstrap", nil)
		return err == nil && status == 200 && json.Unmarshal(body, &token) == nil && token.SecretID != ""
	})
	r.token = token.SecretID
}

// await waits for a condition.
func (r *region) await(what string, ok func() bool) {
	r.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			r.t.Fatalf("%s: not within two minutes", what)
		}
		for _, s := range r.servers {
			if s.failed() {
				r.t.Fatalf("%s: meanwhile %s ended: %v", what, s.name, s.err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// call makes one request to server i.
func (r *region) call(method string, i int, path string, body any) (int, []byte, error) {
	var send io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return 0, nil, err
		}
		send = bytes.NewReader(b)
	}
	req, err := http.NewRequest(method, r.url(i)+path, send)
	if err != nil {
		return 0, nil, err
	}
	if r.token != "" {
		req.Header.Set("X-Nomad-Token", r.token)
	}
	resp, err := r.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, b, err
}

// get reads JSON from server i; false when it does not answer 200.
func (r *region) get(i int, path string, out any) bool {
	status, body, err := r.call(http.MethodGet, i, path, nil)
	return err == nil && status == 200 && json.Unmarshal(body, out) == nil
}

// leaderOf is the leader's Raft address as server i knows it, "" for none.
func (r *region) leaderOf(i int) string {
	var address string
	r.get(i, "/v1/status/leader?stale", &address)
	return address
}

// leader finds the server that leads, as itself and a majority see it.
func (r *region) leader() int {
	r.t.Helper()
	leader := -1
	r.await("a leader", func() bool {
		votes := map[string]int{}
		for i, s := range r.servers {
			if s.running() {
				votes[r.leaderOf(i)]++
			}
		}
		for i := range r.servers {
			if votes[r.net.advertised(i)+":"+strconv.Itoa(regionRaft)] > len(r.servers)/2 {
				leader = i
				return true
			}
		}
		return false
	})
	return leader
}

func (s *serverProcess) start() {
	s.region.t.Helper()
	s.out = &output{}
	s.runs = append(s.runs, s.out)
	s.cmd = exec.Command(s.region.program, append([]string{"server"}, s.flags...)...)
	s.cmd.Dir = s.region.dir
	s.cmd.Env = append(append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66"), s.env...)
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	s.region.net.on(s.i, s.cmd)
	if err := s.cmd.Start(); err != nil {
		s.region.t.Fatal(err)
	}
	s.region.net.runs(s.i, s.cmd.Process.Pid)
	dead := make(chan struct{})
	s.dead = dead
	cmd := s.cmd
	go func() { s.err = cmd.Wait(); close(dead) }()
}

// tell shows the end of what the server printed and keeps all of it in a file.
func (s *serverProcess) tell() {
	t := s.region.t
	f, err := os.CreateTemp("", "rxvision-"+s.name+"-*.log")
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	last := ""
	for _, out := range s.runs {
		last = out.String()
		if _, err := f.WriteString(last); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%s printed (all: %s):\n%s", s.name, f.Name(), last[max(0, len(last)-8000):])
}

func (s *serverProcess) running() bool {
	if s.dead == nil {
		return false
	}
	select {
	case <-s.dead:
		return false
	default:
		return true
	}
}

// failed says whether the process ended without being told to.
func (s *serverProcess) failed() bool { return s.cmd != nil && s.dead != nil && !s.running() }

// kill ends the process as kill -9 does.
func (s *serverProcess) kill() { s.end(syscall.SIGKILL) }

// end sends a signal and waits for the end.
func (s *serverProcess) end(sig syscall.Signal) {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGCONT)
	_ = s.cmd.Process.Signal(sig)
	<-s.dead
	s.cmd = nil
}

// pause and resume are SIGSTOP and SIGCONT.
func (s *serverProcess) pause()  { _ = s.cmd.Process.Signal(syscall.SIGSTOP) }
func (s *serverProcess) resume() { _ = s.cmd.Process.Signal(syscall.SIGCONT) }
