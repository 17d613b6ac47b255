package cluster

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

func testToken(h *harness, secret byte, kind string, policies ...string) *ACLToken {
	return &ACLToken{AccessorID: h.id(), SecretHash: strings.Repeat(fmt.Sprintf("%02x", secret), 32), Type: kind, Policies: policies}
}

func TestBootstrapOnce(t *testing.T) {
	h := newHarness(t)
	if res := h.do(&BootstrapACL{Token: testToken(h, 1, ACLTokenClient, "p")}); CodeOf(res.Err) != CodeInvalid {
		t.Errorf("bootstrap with a client token: %v", res.Err)
	}
	first := testToken(h, 1, ACLTokenManagement)
	done := h.must(&BootstrapACL{Token: first}).Index
	want := fmt.Sprintf("ACL bootstrap already done (reset index: %d)", done)
	for _, reset := range []uint64{0, done + 1} {
		if res := h.do(&BootstrapACL{Token: testToken(h, 2, ACLTokenManagement), ResetIndex: reset}); res.Err == nil || res.Err.Text != want {
			t.Errorf("second bootstrap with reset index %d: %v", reset, res.Err)
		}
	}
	h.must(&BootstrapACL{Token: testToken(h, 2, ACLTokenManagement), ResetIndex: done})
	if got := h.Snapshot().ACLBootstrapIndex(nil); got == done || got != h.index {
		t.Errorf("bootstrap index is %d after the reset at %d", got, h.index)
	}
	if h.Snapshot().ACLToken(nil, first.AccessorID) == nil {
		t.Error("the reset took the first token away")
	}
}

func TestTokenLife(t *testing.T) {
	h := newHarness(t)
	token := testToken(h, 1, ACLTokenClient, "p")
	token.ExpirationTime = h.now + int64(time.Hour)
	h.must(&UpsertACLTokens{Tokens: []*ACLToken{token}})
	for what, c := range map[string]Command{
		"a secret twice":      &UpsertACLTokens{Tokens: []*ACLToken{testToken(h, 1, ACLTokenManagement)}},
		"an accessor twice":   &UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: token.AccessorID, SecretHash: strings.Repeat("f", 64), Type: ACLTokenManagement}}},
		"an unknown accessor": &UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: h.id(), Type: ACLTokenManagement}}},
		"a new Global":        &UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: token.AccessorID, Type: ACLTokenManagement, Global: true}}},
		"born expired":        &UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: h.id(), SecretHash: strings.Repeat("e", 64), Type: ACLTokenManagement, ExpirationTime: 1}}},
		"a plain secret":      &UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: h.id(), SecretHash: h.id(), Type: ACLTokenManagement}}},
		"unknown deletion":    &DeleteACLTokens{AccessorIDs: []string{token.AccessorID, "x"}},
	} {
		if res := h.do(c); CodeOf(res.Err) != CodeInvalid {
			t.Errorf("%s: %v", what, res.Err)
		}
	}
	h.must(&UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: token.AccessorID, Name: "n", Type: ACLTokenClient, Policies: []string{"q"}}}})
	s := h.Snapshot()
	got := s.ACLTokenBySecret(nil, token.SecretHash)
	if got == nil || got.Name != "n" || got.Policies[0] != "q" || got.ExpirationTime != token.ExpirationTime || got.CreateIndex == got.ModifyIndex {
		t.Fatalf("after the update: %+v", got)
	}
	if s.ACLTokenBySecret(nil, token.SecretHash[:32]) != nil {
		t.Error("half a hash finds a token")
	}
	end := token.ExpirationTime
	if before, at := s.ExpiredACLTokens(end-1, 10), s.ExpiredACLTokens(end, 10); len(before) != 0 || len(at) != 1 {
		t.Errorf("expired: %d before the time, %d at it", len(before), len(at))
	}
	collect := &DeleteACLTokens{AccessorIDs: []string{token.AccessorID, "x"}, OnlyExpired: true}
	h.must(collect)
	if h.Snapshot().ACLToken(nil, token.AccessorID) == nil {
		t.Error("a live token was collected")
	}
	h.now = end
	h.must(collect)
	if h.Snapshot().ACLToken(nil, token.AccessorID) != nil {
		t.Error("an expired token was not collected")
	}
}

func TestPolicies(t *testing.T) {
	h := newHarness(t)
	res := h.do(&UpsertACLPolicies{Policies: []*ACLPolicy{{Name: "a_b", Description: strings.Repeat("d", 257)}}})
	if want := "policy 0 invalid: 2 errors occurred:\n\t* invalid name 'a_b'\n\t* description longer than 256\n\n"; res.Err == nil || res.Err.Text != want {
		t.Errorf("bad policy: %v", res.Err)
	}
	h.must(&UpsertACLPolicies{Policies: []*ACLPolicy{{Name: "a", Rules: "x"}, {Name: "ab"}}})
	h.must(&UpsertACLPolicies{Policies: []*ACLPolicy{{Name: "a", Rules: "y"}}})
	if p := h.Snapshot().ACLPolicy(nil, "a"); p.Rules != "y" || p.CreateIndex != 2 || p.ModifyIndex != 3 {
		t.Errorf("updated policy: %+v", p)
	}
	if list := h.Snapshot().ACLPolicies(nil, "a"); len(list) != 2 {
		t.Errorf("policies with prefix a: %d", len(list))
	}
	h.must(&DeleteACLPolicies{Names: []string{"a", "unknown"}})
	if h.Snapshot().ACLPolicy(nil, "a") != nil || h.Snapshot().ACLPolicy(nil, "ab") == nil {
		t.Error("the wrong policy was deleted")
	}
}

// randomACL makes a command of access control, some of them refused.
func randomACL(h *harness, r *rand.Rand) Command {
	name := fmt.Sprintf("p-%d", r.IntN(4))
	var known []string
	for _, token := range h.Snapshot().ACLTokens(nil, "") {
		if r.IntN(2) == 0 {
			known = append(known, token.AccessorID)
		}
	}
	switch r.IntN(6) {
	case 0:
		return &BootstrapACL{Token: testToken(h, byte(r.IntN(8)), ACLTokenManagement), ResetIndex: uint64(r.IntN(2)) * h.Snapshot().ACLBootstrapIndex(nil)}
	case 1:
		return &UpsertACLPolicies{Policies: []*ACLPolicy{{Name: name, Rules: fmt.Sprint(r.IntN(9))}}}
	case 2:
		return &DeleteACLPolicies{Names: []string{name}}
	case 3:
		token := testToken(h, byte(r.IntN(256)), ACLTokenClient, name)
		token.ExpirationTime = h.now + int64(r.IntN(20))*int64(time.Second)
		return &UpsertACLTokens{Tokens: []*ACLToken{token}}
	case 4:
		if len(known) > 0 {
			return &UpsertACLTokens{Tokens: []*ACLToken{{AccessorID: known[0], Name: name, Type: ACLTokenManagement}}}
		}
	}
	return &DeleteACLTokens{AccessorIDs: known, OnlyExpired: r.IntN(2) == 0}
}
