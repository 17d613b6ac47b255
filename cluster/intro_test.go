package cluster

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func testHash(b byte) string { return strings.Repeat(fmt.Sprintf("%02x", b), 32) }

// intro is a token for one use within an hour.
func (h *harness) intro(secret byte, change func(*IntroToken)) *IntroToken {
	k := &IntroToken{ID: h.id(), SecretHash: testHash(secret), Role: RoleNode, Uses: 1, ExpiresTime: h.now + int64(time.Hour)}
	if change != nil {
		change(k)
	}
	return k
}

func enrol(secret byte, name string, key byte) *UseIntroToken {
	return &UseIntroToken{SecretHash: testHash(secret), Role: RoleNode, Name: name, NodeName: "host-" + name, KeyHash: testHash(key)}
}

func TestIntroTokenIsUsedOnce(t *testing.T) {
	h := newHarness(t)
	k := h.intro(1, nil)
	h.must(&CreateIntroToken{Token: k})
	refused := func(c Command, code Code, text string) {
		t.Helper()
		if res := h.do(c); CodeOf(res.Err) != code || !strings.Contains(res.Err.Text, text) {
			t.Errorf("%+v: %v; want %s …%s…", c, res.Err, code, text)
		}
	}
	refused(enrol(2, "n1", 1), CodeForbidden, "is not known")
	refused(&UseIntroToken{SecretHash: testHash(1), Role: RoleGateway, Name: "g", KeyHash: testHash(1)}, CodeForbidden, "for role node, not gateway")
	refused(enrol(1, "../x", 1), CodeInvalid, "cannot be in a certificate")
	h.must(enrol(1, "n1", 1))
	h.must(enrol(1, "n1", 1)) // retried, perhaps by way of another server, with a request ID of its own
	refused(enrol(1, "n2", 2), CodeForbidden, "has been used up")
	refused(enrol(1, "n1", 2), CodeConflict, "enrolled with another key")
	s := h.Snapshot()
	if got := s.IntroToken(nil, k.ID); got.Used != 1 {
		t.Errorf("used %d times", got.Used)
	}
	if e := s.Enrollment(nil, EnrollmentKey{RoleNode, "n1"}); e == nil || e.KeyHash != testHash(1) || e.TokenID != k.ID || len(s.Enrollments(nil, "")) != 1 {
		t.Errorf("enrolment %+v", e)
	}
	h.now += int64(time.Hour)
	refused(enrol(1, "n1", 1), CodeForbidden, "has expired")
	h.must(&CreateIntroToken{Token: h.intro(2, nil)})
	if left := h.Snapshot().IntroTokens(nil, ""); len(left) != 1 || left[0].ID == k.ID {
		t.Errorf("expired tokens stay: %+v", left)
	}
	refused(enrol(1, "n1", 1), CodeForbidden, "is not known")
}

func TestEnrolledNodeIsNotTakenOver(t *testing.T) {
	h := newHarness(t)
	for i := byte(1); i <= 4; i++ {
		h.must(&CreateIntroToken{Token: h.intro(i, func(k *IntroToken) { k.Replace = i == 3 })})
	}
	node := testNode(h.id())
	h.must(&RegisterNode{Node: node})
	key := EnrollmentKey{RoleNode, node.ID}
	h.must(enrol(1, node.ID, 1))
	if res := h.do(enrol(2, node.ID, 2)); CodeOf(res.Err) != CodeConflict {
		t.Errorf("another key by another token: %v", res.Err)
	}
	h.must(enrol(2, node.ID, 1)) // the same key may, as an agent that was away for long does
	h.must(enrol(3, node.ID, 3)) // -replace
	if e := h.Snapshot().Enrollment(nil, key); e.KeyHash != testHash(3) {
		t.Errorf("after replacement: %+v", e)
	}
	if res := h.do(&RegisterNode{Node: node, KeyHash: testHash(1)}); CodeOf(res.Err) != CodeForbidden {
		t.Errorf("registered with the key that was replaced: %v", res.Err)
	}
	h.must(&RegisterNode{Node: node, KeyHash: testHash(3)})
	h.must(&DeregisterNode{NodeID: node.ID})
	if res := h.do(&RegisterNode{Node: node, KeyHash: testHash(3)}); CodeOf(res.Err) != CodeForbidden || h.Snapshot().Node(nil, node.ID) != nil {
		t.Errorf("a purged node came back: %v", res.Err)
	}
	if e := h.Snapshot().Enrollment(nil, key); e != nil {
		t.Errorf("a purged node is still enrolled: %+v", e)
	}
	h.must(enrol(4, node.ID, 4))
	h.must(&DeleteIntroTokens{Enrollments: []EnrollmentKey{key}})
	if h.Snapshot().Enrollment(nil, key) != nil {
		t.Error("a deleted enrolment is there")
	}
}

// TestCollectedNodeStaysEnrolled for a while: it was down, nobody purged it.
func TestCollectedNodeStaysEnrolled(t *testing.T) {
	h := newHarness(t)
	node := testNode(h.id())
	key := EnrollmentKey{RoleNode, node.ID}
	h.must(&CreateIntroToken{Token: h.intro(1, nil)})
	h.must(enrol(1, node.ID, 1))
	gone := func() {
		h.must(&UpdateNodeStatus{Updates: []NodeStatusUpdate{{NodeID: node.ID, Status: NodeStatusDown}}})
		h.must(&Reap{Nodes: []string{node.ID}})
		if h.Snapshot().Node(nil, node.ID) != nil {
			t.Fatal("the node was not collected")
		}
	}
	for _, back := range []bool{true, false} {
		h.must(&RegisterNode{Node: node, KeyHash: testHash(1)})
		gone()
		h.now += KeepEnrollment - int64(time.Minute)
		h.must(&Reap{})
		if h.Snapshot().Enrollment(nil, key) == nil {
			t.Fatal("its enrolment went too soon")
		}
		if back {
			h.must(&RegisterNode{Node: node, KeyHash: testHash(1)})
		}
		h.now += int64(time.Hour)
		h.must(&Reap{})
		if there := h.Snapshot().Enrollment(nil, key) != nil; there != back {
			t.Errorf("came back %v: enrolled %v", back, there)
		}
	}
}

func TestIntroTokensAreChecked(t *testing.T) {
	h := newHarness(t)
	first := h.intro(1, func(k *IntroToken) { k.NodeName, k.Uses = "host-a", 0 })
	h.must(&CreateIntroToken{Token: first})
	for name, change := range map[string]func(*IntroToken){
		"no UUID":              func(k *IntroToken) { k.ID = "x" },
		"a plain secret":       func(k *IntroToken) { k.SecretHash = "secret" },
		"a server":             func(k *IntroToken) { k.Role = "server" },
		"a gateway's node":     func(k *IntroToken) { k.Role, k.NodeName = RoleGateway, "x" },
		"negative uses":        func(k *IntroToken) { k.Uses = -1 },
		"no life":              func(k *IntroToken) { k.ExpiresTime = h.now },
		"a life of two months": func(k *IntroToken) { k.ExpiresTime = h.now + 2*MaxIntroTTL },
		"a secret twice":       func(k *IntroToken) { k.SecretHash = first.SecretHash },
		"an ID twice":          func(k *IntroToken) { k.ID = first.ID },
	} {
		if res := h.do(&CreateIntroToken{Token: h.intro(9, change)}); res.Err == nil {
			t.Errorf("%s was not refused", name)
		}
	}
	// Bound to a name, for any number of uses.
	if res := h.do(enrol(1, "b", 1)); CodeOf(res.Err) != CodeForbidden || !strings.Contains(res.Err.Text, `for node "host-a", not "host-b"`) {
		t.Errorf("another node's name: %v", res.Err)
	}
	for i := byte(1); i < 5; i++ {
		use := enrol(1, fmt.Sprintf("a%d", i), i)
		use.NodeName = "host-a"
		h.must(use)
	}
	if got := h.Snapshot().IntroToken(nil, first.ID); got.Used != 4 {
		t.Errorf("used %d times", got.Used)
	}
	if e := h.Snapshot().Enrollment(nil, EnrollmentKey{RoleNode, "a1"}); e.NodeName != "host-a" {
		t.Errorf("the name is not kept: %+v", e)
	}
	if res := h.do(&DeleteIntroTokens{IDs: []string{first.ID, "x"}}); CodeOf(res.Err) != CodeNotFound || h.Snapshot().IntroToken(nil, first.ID) == nil {
		t.Errorf("deleting an unknown one: %v", res.Err)
	}
	h.must(&DeleteIntroTokens{IDs: []string{first.ID}})
	if len(h.Snapshot().Enrollments(nil, RoleNode)) != 4 || h.Snapshot().IntroToken(nil, first.ID) != nil {
		t.Error("the token is there, or its enrolments are not")
	}
}

// randomIntro makes a command of introduction, some of them refused.
func randomIntro(h *harness, r *rand.Rand) Command {
	switch n := r.IntN(10); {
	case n < 3:
		return &CreateIntroToken{Token: h.intro(byte(r.IntN(40)), func(k *IntroToken) {
			k.Replace, k.Uses, k.ExpiresTime = r.IntN(3) == 0, r.IntN(4), h.now+int64(time.Duration(1+r.IntN(200))*time.Second)
		})}
	case n < 9:
		c := enrol(byte(r.IntN(40)), fmt.Sprintf("n%d", r.IntN(10)), byte(r.IntN(3)))
		if r.IntN(8) == 0 {
			c.Role = RoleGateway
		}
		return c
	}
	c := &DeleteIntroTokens{}
	if all := h.Snapshot().IntroTokens(nil, ""); len(all) > 0 {
		c.IDs = []string{all[r.IntN(len(all))].ID}
	}
	if all := h.Snapshot().Enrollments(nil, ""); len(all) > 0 && r.IntN(2) == 0 {
		c.Enrollments = []EnrollmentKey{{all[0].Role, all[0].Name}}
	}
	return c
}
