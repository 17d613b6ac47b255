package api

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
)

// ifACL serves a route of access control while that is enabled.
func ifACL(handle func(*Server, *request) (any, error)) func(*Server, *request) (any, error) {
	return func(s *Server, r *request) (any, error) {
		if !s.cfg.ACL.Enabled {
			return nil, errNoACL
		}
		return handle(s, r)
	}
}

// policyStub is a policy in a list.
type policyStub struct {
	Name, Description        string
	JobACL                   *struct{}
	Hash                     string
	CreateIndex, ModifyIndex uint64
}

func stubOfPolicy(p *cluster.ACLPolicy) *policyStub {
	return &policyStub{
		Name: p.Name, Description: p.Description, Hash: digest(p.Name, p.Description, p.Rules),
		CreateIndex: p.CreateIndex, ModifyIndex: p.ModifyIndex,
	}
}

// digest is what clients compare two versions of a record by.
func digest(parts ...string) string {
	h := sha256.New()
	for _, part := range parts {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return base64.StdEncoding.EncodeToString(h.Sum(nil))
}

// policy is a policy as clients read it.
type policy struct {
	*policyStub
	Rules     string
	RulesJSON *rulesJSON
}

type rulesJSON struct {
	*acl.Policy
	ExtraKeysHCL []string
	Raw          string
}

// heldPolicies gives the names of the caller's policies.
func (r *request) heldPolicies() []string {
	if r.caller.token == nil {
		return []string{cluster.ACLAnonymousPolicy}
	}
	return r.caller.token.Policies
}

func (s *Server) listPolicies(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		list := snap.ACLPolicies(ws, r.prefix)
		if !r.caller.acl.IsManagement() {
			list = only(list, func(p *cluster.ACLPolicy) bool { return slices.Contains(r.heldPolicies(), p.Name) })
		}
		at := func(p *cluster.ACLPolicy) position { return named(p.Name) }
		stub := func(p *cluster.ACLPolicy) any { return stubOfPolicy(p) }
		return page(r, snap.Index(ws, cluster.TableACLPolicies), list, true, at, stub, stub)
	})
}

func (s *Server) ownPolicies(r *request) (any, error) {
	if r.caller.token == nil && s.cfg.Store.State().Snapshot().ACLPolicy(nil, cluster.ACLAnonymousPolicy) == nil {
		return nil, errDenied
	}
	return s.listPolicies(r)
}

func (s *Server) readPolicy(r *request) (any, error) {
	name := r.params["name"]
	if !r.caller.acl.IsManagement() && !slices.Contains(r.heldPolicies(), name) {
		return nil, errDenied
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		p := snap.ACLPolicy(ws, name)
		if p == nil {
			return missing(snap, ws, cluster.TableACLPolicies, "ACL policy not found")
		}
		rules, err := acl.Parse(p.Rules)
		if err != nil {
			return found{index: p.ModifyIndex, err: fmt.Errorf("ACL policy %s cannot be read by this version of rxvision: %w", name, err)}
		}
		return found{body: &policy{stubOfPolicy(p), p.Rules, &rulesJSON{Policy: rules, Raw: p.Rules}}, index: p.ModifyIndex}
	})
}

func (s *Server) putPolicy(r *request) (any, error) {
	var req nomad.ACLPolicy
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if req.Name != r.params["name"] {
		return nil, badRequest("ACL policy name does not match request path")
	}
	if req.JobACL != nil {
		return nil, notBuilt("this version of rxvision does not support policies of workload identities (JobACL)")
	}
	p := &cluster.ACLPolicy{Name: req.Name, Description: req.Description, Rules: req.Rules}
	var faults []string
	if _, err := acl.Parse(p.Rules); err != nil {
		faults = append(faults, "failed to parse rules: "+strings.ReplaceAll(err.Error(), "\n", "\n\t  "))
	}
	if err := allFaults("policy", append(faults, p.Faults()...)); err != nil {
		return nil, err
	}
	return s.change(r, &cluster.UpsertACLPolicies{Policies: []*cluster.ACLPolicy{p}})
}

// allFaults tells all that is wrong with the one record of a request as Nomad does.
func allFaults(what string, faults []string) error {
	if len(faults) == 0 {
		return nil
	}
	noun := "errors"
	if len(faults) == 1 {
		noun = "error"
	}
	return badRequest("%s 0 invalid: %d %s occurred:\n\t* %s\n\n", what, len(faults), noun, strings.Join(faults, "\n\t* "))
}

// change commits a command and answers with nothing but its index.
func (s *Server) change(r *request, cmd cluster.Command) (any, error) {
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, err
	}
	return &answer{index: res.Index}, nil
}

func (s *Server) deletePolicy(r *request) (any, error) {
	return s.change(r, &cluster.DeleteACLPolicies{Names: []string{r.params["name"]}})
}

// tokenStub is a token in a list.
type tokenStub struct {
	AccessorID, Name, Type   string
	Policies                 []string
	Roles                    []struct{}
	Global                   bool
	Hash                     string
	CreateTime               cluster.Time
	ExpirationTime           cluster.Time
	CreateIndex, ModifyIndex uint64
}

// aclToken is a token as clients read it. The state keeps no secrets: SecretID is
// known only while a token is made, and to who sends it.
type aclToken struct {
	*tokenStub
	ExpirationTTL string
	SecretID      string
}

func stubOfToken(t *cluster.ACLToken) *tokenStub {
	return &tokenStub{
		AccessorID: t.AccessorID, Name: t.Name, Type: t.Type, Policies: t.Policies, Global: t.Global,
		Hash:       digest(append([]string{t.Name, t.Type, fmt.Sprint(t.Global)}, t.Policies...)...),
		CreateTime: cluster.Time(t.CreateTime), ExpirationTime: cluster.Time(t.ExpirationTime),
		CreateIndex: t.CreateIndex, ModifyIndex: t.ModifyIndex,
	}
}

func showToken(t *cluster.ACLToken, secret string) *aclToken {
	out := &aclToken{tokenStub: stubOfToken(t), SecretID: secret}
	if t.ExpirationTTL != 0 {
		out.ExpirationTTL = time.Duration(t.ExpirationTTL).String()
	}
	return out
}

func (s *Server) listTokens(r *request) (any, error) {
	prefix, err := r.idPrefix("acl token")
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		at := func(t *cluster.ACLToken) position { return created(t.CreateIndex, t.AccessorID) }
		stub := func(t *cluster.ACLToken) any { return stubOfToken(t) }
		return page(r, snap.Index(ws, cluster.TableACLTokens), snap.ACLTokens(ws, prefix), false, at, stub, stub)
	})
}

// anonymous stands for requests without a token.
var anonymous = &cluster.ACLToken{
	AccessorID: "anonymous", Name: "Anonymous Token", Type: cluster.ACLTokenClient,
	Policies: []string{cluster.ACLAnonymousPolicy},
}

func (s *Server) ownToken(r *request) (any, error) {
	if r.caller.token == nil {
		return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
			return found{body: showToken(anonymous, ""), index: snap.Index(ws, cluster.TableACLTokens)}
		})
	}
	return s.tokenOf(r, r.caller.token.AccessorID)
}

func (s *Server) readToken(r *request) (any, error) {
	own := r.caller.token != nil && r.caller.token.AccessorID == r.params["accessor"]
	if !own && !r.caller.acl.IsManagement() {
		return nil, errDenied
	}
	id, err := wholeUUID(r.params["accessor"], "acl token")
	if err != nil {
		return nil, err
	}
	return s.tokenOf(r, id)
}

func (s *Server) tokenOf(r *request, accessor string) (any, error) {
	shown := ""
	if t := r.caller.token; t != nil && t.AccessorID == accessor {
		shown = acl.Secret(r.Header)
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		t := snap.ACLToken(ws, accessor)
		if t == nil {
			return missing(snap, ws, cluster.TableACLTokens, errNoToken.Text)
		}
		return found{body: showToken(t, shown), index: t.ModifyIndex}
	})
}

func (s *Server) bootstrapACL(r *request) (any, error) {
	var req struct{ BootstrapSecret string }
	if err := r.decode(&req); err != nil && !errors.Is(err, errEmpty) {
		return nil, err
	}
	secret := req.BootstrapSecret
	if secret == "" {
		secret = newID()
	} else if full, err := uuidPrefix(secret, "bootstrap secret"); err != nil || full != secret || len(full) != uuidLen {
		return nil, badRequest("invalid bootstrap secret: use a random UUID in lower case")
	}
	cmd := &cluster.BootstrapACL{Token: &cluster.ACLToken{
		AccessorID: newID(), SecretHash: acl.HashSecret(secret), Name: "Bootstrap Token", Type: cluster.ACLTokenManagement,
		Global: true, CreateTime: time.Now().UnixNano(),
	}}
	if s.cfg.ACL.BootstrapReset != nil {
		cmd.ResetIndex = s.cfg.ACL.BootstrapReset()
	}
	return s.create(r, cmd, cmd.Token, secret)
}

// create commits the command that makes a token and answers with it; this answer is
// the only one that ever shows the secret to somebody who did not send it.
func (s *Server) create(r *request, cmd cluster.Command, token *cluster.ACLToken, secret string) (any, error) {
	res, err := s.cfg.Store.Apply(r.Context(), cmd)
	if err != nil {
		return nil, err
	}
	t := *token
	t.CreateIndex, t.ModifyIndex = res.Index, res.Index
	return &answer{body: showToken(&t, secret), index: res.Index}, nil
}

func (s *Server) createToken(r *request) (any, error) {
	var req nomad.ACLToken
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if req.AccessorID != "" {
		return s.changeToken(r, &req)
	}
	if err := noRoles(&req); err != nil {
		return nil, err
	}
	now, secret := time.Now(), newID()
	token := &cluster.ACLToken{
		AccessorID: newID(), SecretHash: acl.HashSecret(secret), Name: req.Name, Type: req.Type, Policies: req.Policies,
		Global: req.Global, CreateTime: now.UnixNano(), ExpirationTTL: int64(req.ExpirationTTL),
	}
	faults := token.Faults()
	if req.ExpirationTime != nil || req.ExpirationTTL != 0 {
		ends := now.Add(req.ExpirationTTL)
		if req.ExpirationTime != nil {
			ends = *req.ExpirationTime
		}
		token.ExpirationTime = ends.UnixNano()
		faults = append(faults, s.lifeFaults(req.ExpirationTTL, ends.Sub(now))...)
	}
	if err := allFaults("token", faults); err != nil {
		return nil, err
	}
	return s.create(r, &cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{token}}, token, secret)
}

// lifeFaults says what is wrong with how long a token is to live.
func (s *Server) lifeFaults(ttl, life time.Duration) (faults []string) {
	if ttl < 0 {
		faults = append(faults, fmt.Sprintf("token expiration TTL '%s' should not be negative", ttl))
	}
	if life < 0 {
		faults = append(faults, "expiration time cannot be before create time")
	}
	if least := s.cfg.ACL.MinTokenTTL; life < least {
		faults = append(faults, fmt.Sprintf("expiration time cannot be less than %s in the future (was %s)", least, life))
	}
	if most := s.cfg.ACL.MaxTokenTTL; life > most {
		faults = append(faults, fmt.Sprintf("expiration time cannot be more than %s in the future (was %s)", most, life))
	}
	return faults
}

func noRoles(req *nomad.ACLToken) error {
	for _, role := range req.Roles {
		if role != nil {
			return badRequest("cannot find role %s: this version of rxvision does not support ACL roles", clip(role.ID+role.Name))
		}
	}
	return nil
}

func (s *Server) updateToken(r *request) (any, error) {
	var req nomad.ACLToken
	if err := r.decode(&req); err != nil {
		return nil, err
	}
	if req.AccessorID != r.params["accessor"] {
		return nil, badRequest("ACL token accessor does not match request path")
	}
	return s.changeToken(r, &req)
}

// changeToken changes name, type and policies of a token.
func (s *Server) changeToken(r *request, req *nomad.ACLToken) (any, error) {
	if err := errors.Join(noRoles(req), s.fresh(r)); err != nil {
		return nil, err
	}
	old := s.cfg.Store.State().Snapshot().ACLToken(nil, req.AccessorID)
	if old == nil {
		return nil, badRequest("cannot find token %s", clip(req.AccessorID))
	}
	token := &cluster.ACLToken{AccessorID: old.AccessorID, Name: req.Name, Type: req.Type, Policies: req.Policies, Global: req.Global}
	faults := token.Faults()
	if req.Global != old.Global {
		faults = append(faults, "cannot toggle global mode")
	}
	if req.ExpirationTTL != 0 && int64(req.ExpirationTTL) != old.ExpirationTTL {
		faults = append(faults, "cannot update expiration TTL")
	}
	if req.ExpirationTime != nil && req.ExpirationTime.UnixNano() != old.ExpirationTime {
		faults = append(faults, "cannot update expiration time")
	}
	if err := allFaults("token", faults); err != nil {
		return nil, err
	}
	res, err := s.cfg.Store.Apply(r.Context(), &cluster.UpsertACLTokens{Tokens: []*cluster.ACLToken{token}})
	if err != nil {
		return nil, err
	}
	now := *old
	now.Name, now.Type, now.Policies, now.ModifyIndex = token.Name, token.Type, token.Policies, res.Index
	return &answer{body: showToken(&now, ""), index: res.Index}, nil
}

func (s *Server) deleteToken(r *request) (any, error) {
	id, err := wholeUUID(r.params["accessor"], "acl token")
	if err != nil {
		return nil, badRequest("token lookup failed: %v", err)
	}
	return s.change(r, &cluster.DeleteACLTokens{AccessorIDs: []string{id}})
}
