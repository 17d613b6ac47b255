package fleet

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

func TestResolveToken(t *testing.T) {
	f := start(t, Config{})
	hash := func(c string) string { return strings.Repeat(c, 64) }
	for _, c := range []cluster.Command{
		&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: "a", Rules: "A"}, {Name: "b", Rules: "B"}}},
		&cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{
			{AccessorID: "00000000-0000-4000-8000-000000000001", SecretHash: hash("1"), Type: cluster.ACLTokenManagement},
			{AccessorID: "00000000-0000-4000-8000-000000000002", SecretHash: hash("2"), Type: cluster.ACLTokenClient, Policies: []string{"b", "gone", "a"}, ExpirationTime: time.Now().Add(time.Hour).UnixNano()},
		}},
	} {
		f.must(c)
	}
	ask := func(hash string) *pb.ResolveTokenReply {
		t.Helper()
		r, err := f.client().ResolveToken(t.Context(), &pb.ResolveTokenRequest{SecretHash: hash})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := ask(hash("1")); !r.Found || !r.Management || r.Expires != 0 || r.Rules != nil {
		t.Errorf("manager: %v", r)
	}
	if r := ask(hash("2")); !r.Found || r.Management || strings.Join(r.Rules, "") != "BA" || r.Expires == 0 || !strings.HasSuffix(r.Accessor, "2") {
		t.Errorf("client: %v", r)
	}
	if r := ask(hash("3")); r.Found || r.Rules != nil {
		t.Errorf("unknown: %v", r)
	}
	if r := ask(""); !r.Found || r.Management || r.Rules != nil {
		t.Errorf("nobody: %v", r)
	}
	f.must(&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: "anonymous", Rules: "N"}, {Name: "a", Rules: "A2"}}})
	if r := ask(""); !r.Found || strings.Join(r.Rules, "") != "N" {
		t.Errorf("nobody, with a policy: %v", r)
	}
	if r := ask(hash("2")); strings.Join(r.Rules, "") != "BA2" {
		t.Errorf("after a policy changed: %v", r)
	}
	f.must(&cluster.DeleteACLTokens{AccessorIDs: []string{"00000000-0000-4000-8000-000000000002"}})
	if r := ask(hash("2")); r.Found {
		t.Errorf("deleted: %v", r)
	}
	big := strings.Repeat("x", cluster.MaxACLRules)
	var policies []*cluster.ACLPolicy
	var names []string
	for i := range maxRules/cluster.MaxACLRules + 1 {
		names = append(names, "big-"+strings.Repeat("i", i+1))
		policies = append(policies, &cluster.ACLPolicy{Name: names[i], Rules: big})
	}
	f.must(&cluster.UpsertACLPolicies{Policies: policies})
	f.must(&cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{{AccessorID: "00000000-0000-4000-8000-000000000003", SecretHash: hash("3"), Type: cluster.ACLTokenClient, Policies: names}}})
	if _, err := f.client().ResolveToken(t.Context(), &pb.ResolveTokenRequest{SecretHash: hash("3")}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("too many rules: %v", err)
	}
}
