package e2e

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestThreeServers forms a region and lets the real nomad look at it from every
// server.
func TestThreeServers(t *testing.T) {
	r := newRegion(t, 3, 3)
	r.start()
	r.bootstrapACL()
	leader := r.leader()
	for i := range r.servers {
		members := r.nomad(i, 0, "server", "members")
		members.has(t, "s1.global", "s2.global", "s3.global")
		if n := strings.Count(members.text, "alive"); n != 3 {
			t.Errorf("s%d sees %d servers alive:\n%s", i+1, n, members.text)
		}
		peers := r.nomad(i, 0, "operator", "raft", "list-peers")
		peers.matches(t, `^s`+string(rune('1'+leader))+`\.global .* leader +true`)
		if n := strings.Count(peers.text, "follower"); n != 2 {
			t.Errorf("s%d lists %d followers:\n%s", i+1, n, peers.text)
		}
	}
	r.await("autopilot calls all servers healthy", func() bool {
		var health struct {
			Healthy bool
			Voters  []string
		}
		return r.get((leader+1)%3, "/v1/operator/autopilot/health", &health) && health.Healthy && len(health.Voters) == 3
	})
	r.nomad(0, 0, "operator", "autopilot", "health").has(t, "Healthy", "true")
	r.nomad(1, 0, "operator", "autopilot", "get-config").matches(t, `CleanupDeadServers += true`)
	r.nomad(2, 0, "operator", "autopilot", "set-config", "-cleanup-dead-servers=false")
	r.nomad(1, 0, "operator", "autopilot", "get-config").matches(t, `CleanupDeadServers += false`)

	next := (leader + 1) % 3
	r.nomad(0, 0, "operator", "raft", "transfer-leadership", "-peer-address", r.net.advertised(next)+":7648")
	r.await("leadership has moved", func() bool { return r.leader() == next })
	r.settle()
}

// TestFiveServers loses two of five, the leader among them, and goes on; with a third
// it takes no writes, and goes on again when two are back.
func TestFiveServers(t *testing.T) {
	r := newRegion(t, 5, 5)
	r.start()
	r.bootstrapACL()
	write := func(i int, id string) int {
		status, _, err := r.call(http.MethodPut, i, "/v1/jobs", map[string]any{"Job": loadJob(id, "")})
		if err != nil {
			return 0
		}
		return status
	}
	leader := r.leader()
	first, second, third, rest := leader, (leader+1)%5, (leader+2)%5, (leader+3)%5
	r.servers[first].kill()
	r.servers[second].kill()
	r.await("a write through what is left of five", func() bool { return write(rest, "with-three") == http.StatusOK })
	r.servers[third].kill()
	if got := write(rest, "with-two"); got == http.StatusOK {
		t.Error("two of five took a write")
	}
	r.start(second, third)
	r.await("a write through four", func() bool { return write(rest, "with-four") == http.StatusOK })
	r.start(first)
	r.settle()
	for i := range r.servers {
		for _, id := range []string{"with-three", "with-four"} {
			var job struct{ ID string }
			if !r.get(i, "/v1/job/"+id+"?stale", &job) || job.ID != id {
				t.Errorf("s%d does not know job %s", i+1, id)
			}
		}
	}
}

// spawn runs a part of the platform on this host until the test ends.
func (r *region) spawn(env []string, args ...string) *output {
	r.t.Helper()
	_, out := r.spawnOn(-1, env, args...)
	return out
}

// spawnOn runs a part of the platform on a host of the network, -1: on this one.
func (r *region) spawnOn(host int, env []string, args ...string) (*os.Process, *output) {
	r.t.Helper()
	out := &output{}
	cmd := exec.Command(binary, args...)
	cmd.Dir = r.dir
	cmd.Env = append(append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66"), env...)
	cmd.Stdout, cmd.Stderr = out, out
	if host >= 0 {
		r.net.on(host, cmd)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	if host >= 0 {
		r.net.runs(host, cmd.Process.Pid)
	}
	r.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		_ = cmd.Process.Signal(os.Interrupt)
		_ = cmd.Wait()
		if r.t.Failed() {
			text := out.String()
			r.t.Logf("%s printed:\n%s", args[0], text[max(0, len(text)-6000):])
		}
	})
	return cmd.Process, out
}

// rpcServers are the flags that name the agent ports of all servers.
func (r *region) rpcServers() (flags []string) {
	for i := range r.servers {
		flags = append(flags, "--server", net.JoinHostPort(r.net.ip(i), strconv.Itoa(regionRPC)))
	}
	return flags
}

// TestRegionServes takes a model through a whole region under TLS and ACL: an agent
// and a gateway enrol with introduction tokens, a worker gets a certificate, and
// only who holds a token that may infer gets an answer, also while a
// server is dead.
func TestRegionServes(t *testing.T) {
	ort := ortLibrary(t)
	shared := t.TempDir()
	r := newRegion(t, 3, 3, "--blobs", "file://"+shared+"?shared=true")
	r.start()
	r.bootstrapACL()
	intro := func(role string) string { // the token is the last line; what is said about it goes to stderr
		lines := strings.Split(strings.TrimSpace(r.run("node", "intro", "--role", role)), "\n")
		return lines[len(lines)-1]
	}
	gateway := freeAddr(t)
	r.spawn([]string{"RXVISION_INTRO_TOKEN=" + intro("node")}, append([]string{
		"agent", "--name", "host", "--data-dir", r.path("agent"), "--tls-ca", "ca.pem", "--http-addr", freeAddr(t),
		"--stop-tasks-on-exit", "--ort-library", ort,
	}, r.rpcServers()...)...)
	r.spawn([]string{"RXVISION_INTRO_TOKEN=" + intro("gateway")}, append([]string{
		"gateway", "--name", "front", "--data-dir", r.path("gateway"), "--tls-ca", "ca.pem", "--http-addr", gateway,
	}, r.rpcServers()...)...)
	r.await("the node is ready", func() bool {
		var nodes []struct{ Status string }
		return r.get(1, "/v1/nodes", &nodes) && len(nodes) == 1 && nodes[0].Status == "ready"
	})
	r.run("model", "push", "fashion", filepath.Join(root, "models/fashion/fashion.onnx"))
	r.run("job", "run", filepath.Join(root, "jobs/examples/fashion.nomad.hcl"))

	policy := write(t, "infer.hcl", "model \"fashion\" {\n  capabilities = [\"infer\"]\n}\n")
	r.nomad(2, 0, "acl", "policy", "apply", "infer", policy)
	out := r.nomad(1, 0, "acl", "token", "create", "-name", "app", "-policy", "infer", "-json").text
	var token struct{ SecretID string }
	if err := json.Unmarshal([]byte(out), &token); err != nil || token.SecretID == "" {
		t.Fatalf("token: %v in %s", err, out)
	}
	picture, err := os.ReadFile(filepath.Join(root, "testdata/fashion/0000-9.png"))
	if err != nil {
		t.Fatal(err)
	}
	classify := func(secret string) (int, string) {
		header := map[string]string{"Content-Type": "image/png"}
		if secret != "" {
			header["Authorization"] = "Bearer " + secret
		}
		status, body, err := send(http.MethodPost, "http://"+gateway+"/v1/models/fashion/classify", header, bytes.NewReader(picture))
		if err != nil {
			return 0, err.Error()
		}
		return status, body
	}
	r.await("a token that may infer gets an answer", func() bool {
		status, body := classify(token.SecretID)
		return status == 200 && strings.Contains(body, "Ankle boot")
	})
	for who, secret := range map[string]string{"nobody": "", "a stranger": "00000000-0000-4000-8000-000000000000"} {
		if status, body := classify(secret); status != 401 && status != 403 {
			t.Errorf("%s was answered %d: %s", who, status, body)
		}
	}
	if status, _, err := r.call(http.MethodGet, 0, "/v1/jobs", nil); err != nil || status != 200 {
		t.Errorf("the management token lists jobs: %d %v", status, err)
	}

	dead := r.leader()
	r.servers[dead].kill()
	for range 50 {
		if status, body := classify(token.SecretID); status != 200 {
			t.Errorf("while the leader is dead inference answers %d: %s", status, body)
		}
	}
	alive := (dead + 1) % 3
	r.await("the node is still ready at a survivor and takes new work", func() bool {
		var nodes []struct{ Status string }
		return r.get(alive, "/v1/nodes", &nodes) && len(nodes) == 1 && nodes[0].Status == "ready"
	})
	r.servers[dead].start()
	r.settle()
}
