package e2e

import (
	"strings"
	"syscall"
	"testing"
	"time"
)

// ended waits until a server's process has ended by itself and gives how.
func (s *serverProcess) ended() error {
	s.region.t.Helper()
	select {
	case <-s.dead:
	case <-time.After(2 * time.Minute):
		s.region.t.Fatalf("%s has not ended", s.name)
	}
	s.cmd = nil
	return s.err
}

// TestServersLeave takes servers out of a region in every way there is, and back in.
func TestServersLeave(t *testing.T) {
	r := newRegion(t, 3, 3, "--leave-on-terminate")
	r.start()
	r.bootstrapACL()
	r.nomad(0, 0, "operator", "autopilot", "set-config", "-cleanup-dead-servers=false")
	voters := func(at, want int) {
		t.Helper()
		r.await("the voters agree", func() bool {
			var c struct{ Servers []struct{ Voter bool } }
			n := 0
			if !r.get(at, "/v1/operator/raft/configuration", &c) {
				return false
			}
			for _, s := range c.Servers {
				if s.Voter {
					n++
				}
			}
			return n == want && len(c.Servers) == want
		})
	}
	status := func(at int, name string) string {
		var m struct {
			Members []struct{ Name, Status string }
		}
		if !r.get(at, "/v1/agent/members", &m) {
			return ""
		}
		for _, s := range m.Members {
			if s.Name == name+".global" {
				return s.Status
			}
		}
		return "gone"
	}
	is := func(at int, name, want string) {
		t.Helper()
		r.await(name+" is "+want, func() bool { return status(at, name) == want })
	}
	voters(0, 3)

	// One that is dead is taken out by another; one that is there is not.
	leader := r.leader()
	dead, other := (leader+1)%3, (leader+2)%3
	name := r.servers[dead].name
	r.nomad(other, 1, "server", "force-leave", name+".global").has(t, name+".global is alive")
	r.nomad(other, 0, "server", "force-leave", "nobody.global")
	r.servers[dead].kill()
	is(other, name, "failed")
	r.nomad(other, 0, "server", "force-leave", name+".global")
	voters(leader, 2)
	is(other, name, "left")
	r.nomad(leader, 0, "server", "force-leave", "-prune", name+".global")
	is(leader, name, "gone")
	r.start(dead)
	is(other, name, "alive")
	voters(leader, 3)

	// The leader leaves when it is asked to, through another server.
	name = r.servers[leader].name
	if out := r.run("server", "leave", "--address", r.url(other), name); !strings.Contains(out, "server "+name+" has left its region and ends") {
		t.Errorf("leave printed %s", out)
	}
	if err := r.servers[leader].ended(); err != nil {
		t.Errorf("a server that left ended with %v", err)
	}
	voters(other, 2)
	is(other, name, "left")
	r.await("another leads", func() bool { return r.leaderOf(other) != "" })
	r.start(leader)
	is(other, name, "alive")
	voters(other, 3)

	// SIGTERM takes out what is set so, but never the last one.
	for i, want := range []int{2, 1} {
		s := r.servers[i]
		s.end(syscall.SIGTERM)
		if s.err != nil {
			t.Errorf("%s, told to end, ended with %v", s.name, s.err)
		}
		voters(2, want)
		is(2, s.name, "left")
	}
	last := r.servers[2]
	last.end(syscall.SIGTERM)
	if last.err == nil || !strings.Contains(last.out.String(), "only voter") {
		t.Errorf("the last server ended with %v", last.err)
	}
	r.start(2)
	voters(2, 1)
}
