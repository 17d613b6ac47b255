package api_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

const unknownUUID = "00000000-0000-4000-8000-000000000000"

// TestPolicyCalls holds the calls about policies against what Nomad answers.
func TestPolicyCalls(t *testing.T) {
	g := newGuarded(t)
	m := g.manager()
	const bad = "policy 0 invalid: 2 errors occurred:\n\t* failed to parse rules: line 1: unknown block \"nod\"; did you mean \"node\"?\n\t  line 2: invalid policy \"raed\" of block quota: use read, write, deny\n\t* invalid name 'a_b'\n\n"
	for _, test := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"PUT", "/v1/acl/policy/a", `{"Name":"b","Rules":""}`, 400, "ACL policy name does not match request path"},
		{"PUT", "/v1/acl/policy/a", ``, 400, "Request body is empty"},
		{"PUT", "/v1/acl/policy/a_b", `{"Name":"a_b","Rules":"nod {}\nquota { policy = \"raed\" }"}`, 400, bad},
		{"PUT", "/v1/acl/policy/a", `{"Name":"a","Description":"` + strings.Repeat("d", 257) + `"}`, 400, "policy 0 invalid: 1 error occurred:\n\t* description longer than 256\n\n"},
		{"PUT", "/v1/acl/policy/a", `{"Name":"a","JobACL":{"Namespace":"default"}}`, 501, "this version of rxvision does not support policies of workload identities (JobACL)"},
		{"PUT", "/v1/acl/policy/readers", `{"Name":"readers","Description":"d","Rules":"namespace \"default\" { policy = \"read\" }"}`, 200, ""},
		{"GET", "/v1/acl/policy/nosuch", "", 404, "ACL policy not found"},
		{"DELETE", "/v1/acl/policy/nosuch", "", 200, ""},
		{"POST", "/v1/acl/policies", "", 405, "Invalid method"},
		{"GET", "/v1/acl/roles", "", 501, "this version of rxvision does not support ACL roles, auth methods, binding rules and login"},
		{"PUT", "/v1/acl/token/onetime", "", 501, "this version of rxvision does not support one-time tokens"},
	} {
		g.wants(test.method+" "+test.path, g.ask(test.method, test.path, test.body, m), test.status, test.want)
	}
	var p struct {
		Name, Rules, Hash string
		RulesJSON         struct {
			Raw        string
			Namespaces []struct{ Capabilities []string }
		}
	}
	r := g.ask("GET", "/v1/acl/policy/readers", "", m)
	g.decoded(r, &p)
	if p.Name != "readers" || p.Hash == "" || p.RulesJSON.Raw != p.Rules || len(p.RulesJSON.Namespaces[0].Capabilities) != 9 || r.header.Get("X-Nomad-KnownLeader") != "true" || r.header.Get("X-Nomad-Index") == "0" {
		t.Errorf("%s %v", r.body, r.header)
	}
	if got := g.ids(g.ask("GET", "/v1/acl/policies?prefix=re", "", m), "Name"); got != "readers" {
		t.Errorf("by prefix: %s", got)
	}
	if got := g.ids(g.ask("GET", "/v1/acl/policies?filter=Description+%3D%3D+d", "", m), "Name"); got != "readers" {
		t.Errorf("by filter: %s", got)
	}
	if strings.Contains(g.ask("GET", "/v1/acl/policies", "", m).body, "Rules") {
		t.Error("the list tells rules")
	}
	for i := range 3 {
		g.apply(&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: fmt.Sprintf("zz-%d", i)}}})
	}
	first := g.ask("GET", "/v1/acl/policies?prefix=zz&per_page=2", "", m)
	second := g.ask("GET", "/v1/acl/policies?prefix=zz&per_page=2&next_token="+first.header.Get("X-Nomad-NextToken"), "", m)
	if got := g.ids(first, "Name") + " | " + g.ids(second, "Name"); got != "zz-0 zz-1 | zz-2" {
		t.Errorf("pages %s", got)
	}
}

// TestTokenCalls holds the calls about tokens against what Nomad answers.
func TestTokenCalls(t *testing.T) {
	g := newGuarded(t)
	m := g.manager()
	token := func(body string) string { return `{"Type":"client","Policies":["readers"],` + body + `}` }
	fault := func(texts ...string) string {
		noun := "error"
		if len(texts) > 1 {
			noun = "errors"
		}
		return fmt.Sprintf("token 0 invalid: %d %s occurred:\n\t* %s\n\n", len(texts), noun, strings.Join(texts, "\n\t* "))
	}
	for _, test := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"PUT", "/v1/acl/token", `{"Type":"client"}`, 400, fault("client token missing policies or roles")},
		{"PUT", "/v1/acl/token", `{"Type":"bogus","Policies":["readers"]}`, 400, fault("token type must be client or management")},
		{"PUT", "/v1/acl/token", `{"Type":"management","Policies":["readers"]}`, 400, fault("management token cannot be associated with policies or roles")},
		{"PUT", "/v1/acl/token", token(`"Name":"` + strings.Repeat("x", 257) + `"`), 400, fault("token name too long")},
		{"PUT", "/v1/acl/token", token(`"ExpirationTTL":"1s"`), 400, fault("expiration time cannot be less than 1m0s in the future (was 1s)")},
		{"PUT", "/v1/acl/token", token(`"ExpirationTTL":"99999h"`), 400, fault("expiration time cannot be more than 24h0m0s in the future (was 99999h0m0s)")},
		{"PUT", "/v1/acl/token", token(`"ExpirationTTL":"-1h"`), 400, fault("token expiration TTL '-1h0m0s' should not be negative", "expiration time cannot be before create time", "expiration time cannot be less than 1m0s in the future (was -1h0m0s)")},
		{"PUT", "/v1/acl/token", token(`"AccessorID":"` + unknownUUID + `"`), 400, "cannot find token " + unknownUUID},
		{"PUT", "/v1/acl/token/" + unknownUUID, token(`"AccessorID":"` + unknownUUID + `"`), 400, "cannot find token " + unknownUUID},
		{"PUT", "/v1/acl/token/" + unknownUUID, token(`"AccessorID":"x"`), 400, "ACL token accessor does not match request path"},
		{"PUT", "/v1/acl/token", `{"Type":"client","Roles":[{"Name":"r"}]}`, 400, "cannot find role r: this version of rxvision does not support ACL roles"},
		{"PUT", "/v1/acl/token", ``, 400, "Request body is empty"},
		{"GET", "/v1/acl/token/nosuch", "", 500, "acl token lookup failed: index error: UUID must be 36 characters"},
		{"GET", "/v1/acl/token/" + unknownUUID, "", 404, "ACL token not found"},
		{"DELETE", "/v1/acl/token/" + unknownUUID, "", 400, "Cannot delete nonexistent tokens: " + unknownUUID},
		{"DELETE", "/v1/acl/token/x", "", 400, "token lookup failed: acl token lookup failed: index error: UUID must be 36 characters"},
		{"GET", "/v1/acl/tokens?prefix=f9a", "", 500, "acl token lookup failed: index error: Input (without hyphens) must be even length"},
	} {
		g.wants(test.method+" "+test.path+" "+test.body, g.ask(test.method, test.path, test.body, m), test.status, test.want)
	}
	// A policy that is not there gives nothing, until it is there.
	made := g.made(g.ask("PUT", "/v1/acl/token", token(`"Name":"t","ExpirationTTL":"1h0m0s","SecretID":"`+unknownUUID+`"`), m))
	if made.SecretID == "" || made.SecretID == unknownUUID || made.ExpirationTTL != time.Hour || made.ExpirationTime.Sub(made.CreateTime) != time.Hour || made.CreateIndex == 0 {
		t.Errorf("created %+v", made)
	}
	g.wants("before the policy", g.ask("GET", "/v1/jobs", "", made.SecretID), 403, "Permission denied")
	g.apply(&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: "readers", Rules: `namespace "default" { policy = "read" }`}}})
	if r := g.ask("GET", "/v1/jobs", "", made.SecretID); r.status != 200 {
		t.Errorf("with the policy: %d %s", r.status, r.body)
	}
	at := "/v1/acl/token/" + made.AccessorID
	change := func(rest string) string {
		return `{"AccessorID":"` + made.AccessorID + `","Type":"client","Policies":["readers"]` + rest + `}`
	}
	g.wants("a new Global", g.ask("PUT", at, change(`,"Global":true`), m), 400, fault("cannot toggle global mode"))
	g.wants("a new TTL", g.ask("PUT", at, change(`,"ExpirationTTL":"2h"`), m), 400, fault("cannot update expiration TTL"))
	updated := g.made(g.ask("PUT", at, change(`,"Name":"n","ExpirationTTL":"1h0m0s"`), m))
	if updated.Name != "n" || updated.SecretID != "" || updated.ModifyIndex <= updated.CreateIndex || !updated.ExpirationTime.Equal(*made.ExpirationTime) {
		t.Errorf("updated %+v", updated)
	}
	// The secret is shown to who sent it, and to nobody else.
	if self := g.made(g.ask("GET", "/v1/acl/token/self", "", made.SecretID)); self.SecretID != made.SecretID || self.AccessorID != made.AccessorID {
		t.Errorf("self %+v", self)
	}
	if own := g.made(g.ask("GET", at, "", made.SecretID)); own.SecretID != made.SecretID {
		t.Errorf("own %+v", own)
	}
	if other := g.made(g.ask("GET", at, "", m)); other.SecretID != "" || other.Name != "n" {
		t.Errorf("another's %+v", other)
	}
	list := g.ask("GET", "/v1/acl/tokens", "", m)
	if strings.Contains(list.body, "Secret") || strings.Contains(list.body, made.SecretID) || !strings.Contains(list.body, made.AccessorID) {
		t.Errorf("list: %s", list.body)
	}
	g.wants("another's token", g.ask("GET", "/v1/acl/token/"+g.made(g.ask("GET", "/v1/acl/token/self", "", m)).AccessorID, "", made.SecretID), 403, "Permission denied")
	if own := g.ids(g.ask("GET", "/v1/acl/policies", "", made.SecretID), "Name"); own != "readers" {
		t.Errorf("own policies: %s", own)
	}
	g.wants("another's policy", g.ask("GET", "/v1/acl/policy/other", "", made.SecretID), 403, "Permission denied")
	if self := g.made(g.ask("GET", "/v1/acl/token/self", "", "")); self.AccessorID != "anonymous" || self.Policies[0] != "anonymous" {
		t.Errorf("nobody: %+v", self)
	}
	g.wants("nobody's policies", g.ask("GET", "/v1/acl/policy/self", "", ""), 403, "Permission denied")
	g.wants("deletion", g.ask("DELETE", at, "", m), 200, "")
	g.wants("a deleted token", g.ask("GET", "/v1/jobs", "", made.SecretID), 403, "ACL token not found")
	// The last manager may go, as in Nomad.
	g.wants("the last manager", g.ask("DELETE", "/v1/acl/token/"+g.made(g.ask("GET", "/v1/acl/token/self", "", m)).AccessorID, "", m), 200, "")
}

func (g *guarded) made(r reply) *nomad.ACLToken {
	g.Helper()
	out := new(nomad.ACLToken)
	g.decoded(r, out)
	return out
}

func TestBootstrap(t *testing.T) {
	var reset uint64
	g := &guarded{wire: newServer(t, func(c *api.Config) {
		c.ACL = api.ACL{Enabled: true, BootstrapReset: func() uint64 { return reset }}
	})}
	g.wants("nobody", g.ask("GET", "/v1/jobs", "", ""), 403, "Permission denied")
	for _, secret := range []string{"x", strings.ToUpper("abcdefab-0000-4000-8000-000000000000"), unknownUUID + "0", strings.Repeat("0", 36)} {
		if r := g.ask("PUT", "/v1/acl/bootstrap", `{"BootstrapSecret":"`+secret+`"}`, ""); r.status != 400 || !strings.Contains(r.body, "invalid bootstrap secret") {
			t.Errorf("secret %s: %d %s", secret, r.status, r.body)
		}
	}
	first := g.made(g.ask("PUT", "/v1/acl/bootstrap", "", ""))
	if first.Type != "management" || !first.Global || first.Name != "Bootstrap Token" || len(first.SecretID) != 36 {
		t.Fatalf("%+v", first)
	}
	if r := g.ask("GET", "/v1/jobs", "", first.SecretID); r.status != 200 {
		t.Errorf("with the token: %d %s", r.status, r.body)
	}
	done := fmt.Sprintf("ACL bootstrap already done (reset index: %d)", first.CreateIndex)
	g.wants("again", g.ask("PUT", "/v1/acl/bootstrap", "", ""), 400, done)
	reset = first.CreateIndex + 1
	g.wants("with a wrong index", g.ask("PUT", "/v1/acl/bootstrap", "", ""), 400, done)
	reset = first.CreateIndex
	const chosen = "c405e000-0000-4000-8000-000000000001"
	if second := g.made(g.ask("POST", "/v1/acl/bootstrap", `{"BootstrapSecret":"`+chosen+`"}`, "")); second.SecretID != chosen {
		t.Errorf("chosen secret: %+v", second)
	}
	if r := g.ask("GET", "/v1/jobs", "", chosen); r.status != 200 {
		t.Errorf("with the chosen secret: %d %s", r.status, r.body)
	}
}

func TestAnonymousPolicy(t *testing.T) {
	g := newGuarded(t)
	g.wants("before", g.ask("GET", "/v1/jobs", "", ""), 403, "Permission denied")
	g.apply(&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: "anonymous", Rules: `namespace "default" { policy = "read" }`}}})
	if r := g.ask("GET", "/v1/jobs", "", ""); r.status != 200 {
		t.Errorf("with the policy: %d %s", r.status, r.body)
	}
	g.wants("more than it says", g.ask("DELETE", "/v1/job/web", "", ""), 403, "Permission denied")
	if got := g.ids(g.ask("GET", "/v1/acl/policy/self", "", ""), "Name"); got != "anonymous" {
		t.Errorf("nobody's policies: %s", got)
	}
	g.wants("a bad token is no anonymous one", g.ask("GET", "/v1/jobs", "", unknownUUID), 403, "ACL token not found")
	g.apply(&cluster.DeleteACLPolicies{Names: []string{"anonymous"}})
	g.wants("after", g.ask("GET", "/v1/jobs", "", ""), 403, "Permission denied")
}

// TestChangesOfPoliciesCountAtOnce changes and deletes what is compiled already, and
// puts another state in its place where the same policy means something else.
func TestChangesOfPoliciesCountAtOnce(t *testing.T) {
	g := newGuarded(t)
	token := g.token(`namespace "default" { policy = "read" }`)
	name := g.made(g.ask("GET", "/v1/acl/token/self", "", token)).Policies[0]
	ask := func() int { return g.ask("GET", "/v1/jobs", "", token).status }
	if got := ask(); got != 200 {
		t.Fatal(got)
	}
	g.apply(&cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{{Name: name, Rules: `namespace "default" { policy = "deny" }`}}})
	if got := ask(); got != 403 {
		t.Errorf("after the policy became a denial: %d", got)
	}
	denied := g.store.State().Snapshot().ACLPolicy(nil, name)
	restore := cluster.NewRestore()
	err := g.store.State().Snapshot().Records(func(t *cluster.Table, _ string, record any) error {
		if p, ok := record.(*cluster.ACLPolicy); ok && p.Name == name {
			other := cluster.Clone(denied)
			other.Rules = `namespace "default" { policy = "write" }`
			record = other
		}
		return restore.Add(t, cluster.Marshal(record))
	})
	if err != nil {
		t.Fatal(err)
	}
	state, err := restore.Done()
	if err != nil {
		t.Fatal(err)
	}
	g.store.mu.Lock()
	g.store.state = state
	g.store.mu.Unlock()
	if got := ask(); got != 200 {
		t.Errorf("after a restore with another policy at the same index: %d", got)
	}
	g.apply(&cluster.DeleteACLPolicies{Names: []string{name}})
	if got := ask(); got != 403 {
		t.Errorf("after the policy was deleted: %d", got)
	}
}

// TestTokenEndsWhileAQueryWaits blocks on a list and takes the token away.
func TestTokenEndsWhileAQueryWaits(t *testing.T) {
	g := newGuarded(t)
	token := g.token(`namespace "default" { policy = "read" }`)
	accessor := g.made(g.ask("GET", "/v1/acl/token/self", "", token)).AccessorID
	index := g.ask("GET", "/v1/jobs", "", token).header.Get("X-Nomad-Index")
	answer := make(chan reply, 1)
	go func() { answer <- g.ask("GET", "/v1/jobs?index="+index, "", token) }()
	waitBlocked(t, g.server)
	g.apply(&cluster.DeleteACLTokens{AccessorIDs: []string{accessor}})
	g.job("news")
	g.wants("after the wait", <-answer, 403, "ACL token not found")
}

// waitBlocked waits until a blocking query is under way, as the metrics tell.
func waitBlocked(t *testing.T, server http.Handler) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		w := httptest.NewRecorder()
		server.ServeHTTP(w, httptest.NewRequest("GET", "http://127.0.0.1/v1/metrics?format=prometheus", nil))
		if strings.Contains(w.Body.String(), "rxvision_http_blocking_queries 1") {
			return
		}
	}
	t.Fatal("no query blocks")
}

func TestBearerToken(t *testing.T) {
	g := newGuarded(t)
	token := g.manager()
	for header, want := range map[string]int{
		"Bearer " + token: 200, "bearer " + token: 200, "Bearer  " + token: 200, token: 403, "Basic " + token: 403, "Bearer": 403, "Bearer ": 403, "Bearer " + token + "x": 403,
	} {
		r := httptest.NewRequest("GET", "http://127.0.0.1/v1/jobs", nil)
		r.Header.Set("Authorization", header)
		w := httptest.NewRecorder()
		g.server.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("%q: %d %s", strings.ReplaceAll(header, token, "TOKEN"), w.Code, w.Body)
		}
	}
}

// TestSecretsStaySecret looks for a secret wherever it could be left: logs, metrics,
// the state's records.
func TestSecretsStaySecret(t *testing.T) {
	var log lockedBuilder
	g := &guarded{wire: newServer(t, func(c *api.Config) {
		c.ACL.Enabled = true
		c.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})}
	first := g.made(g.ask("PUT", "/v1/acl/bootstrap", "", ""))
	token := g.made(g.ask("PUT", "/v1/acl/token", `{"Type":"management"}`, first.SecretID))
	g.ask("GET", "/v1/acl/token/self", "", token.SecretID)
	g.ask("PUT", "/v1/acl/token/"+token.AccessorID, `{"AccessorID":"`+token.AccessorID+`","Type":"management","SecretID":"`+token.SecretID+`"}`, first.SecretID)
	const typo = "5ec2e700-dead-4000-8000-000000000000"
	g.ask("GET", "/v1/jobs", "", typo)
	where := map[string]string{"log": log.String(), "metrics": g.ask("GET", "/v1/metrics?format=prometheus", "", "").body}
	err := g.store.State().Snapshot().Records(func(t *cluster.Table, key string, record any) error {
		b, err := json.Marshal(record)
		where["table "+t.Name] += key + string(b) + string(cluster.Marshal(record))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range where {
		for _, secret := range []string{first.SecretID, token.SecretID, typo} {
			if strings.Contains(text, secret) {
				t.Errorf("the %s tells a secret", what)
			}
		}
	}
	if !strings.Contains(where["log"], "/v1/acl/bootstrap") || !strings.Contains(where["table acl_tokens"], token.AccessorID) {
		t.Error("the test looks at the wrong places")
	}
}

type lockedBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuilder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuilder) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
