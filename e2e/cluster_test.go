package e2e

import (
	"strings"
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
	r.nomad(0, 0, "operator", "raft", "transfer-leadership", "-peer-address", r.advertised(next)+":7648")
	r.await("leadership has moved", func() bool { return r.leader() == next })
	r.settle()
}
