package api_test

import (
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

func TestIntroTokens(t *testing.T) {
	w := newWorld(t)
	c, err := api.NewClient(w.url, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	made, err := c.CreateIntroToken(t.Context(), &api.IntroRequest{NodeName: "gpu-1", TTL: "90m", Replace: true})
	if err != nil {
		t.Fatal(err)
	}
	left := time.Until(time.Unix(0, made.ExpiresTime))
	if !strings.HasPrefix(made.Secret, "rxi-") || len(made.Secret) < 28 || made.Role != cluster.RoleNode || made.Uses != 1 || left > 90*time.Minute || left < 80*time.Minute {
		t.Errorf("made %+v, which lives for %s", made, left)
	}
	// The secret is nowhere but in that answer; its hash finds the token.
	kept := w.store.State().Snapshot().IntroTokenBySecret(nil, acl.HashSecret(made.Secret))
	if kept == nil || kept.ID != made.ID || kept.NodeName != "gpu-1" || !kept.Replace {
		t.Fatalf("kept %+v", kept)
	}
	list, err := c.IntroTokens(t.Context())
	if err != nil || len(list) != 1 || list[0].ID != made.ID || list[0].Secret != "" {
		t.Errorf("listed %+v, %v", list, err)
	}
	unlimited := 0
	for text, req := range map[string]*api.IntroRequest{
		"is no duration": {TTL: "soon"}, "expected more than 0": {TTL: "-1h"}, "at most 720h": {TTL: "1000h"}, "role": {Role: "server"},
		"a node name goes with": {Role: "gateway", NodeName: "x"}, "": {Role: "gateway", Uses: &unlimited},
	} {
		_, err := c.CreateIntroToken(t.Context(), req)
		if text == "" && err != nil || text != "" && (cluster.CodeOf(err) != cluster.CodeInvalid || !strings.Contains(err.Error(), text)) {
			t.Errorf("%+v: %v, want %q", req, err, text)
		}
	}
	w.apply(&cluster.UseIntroToken{SecretHash: kept.SecretHash, Role: cluster.RoleNode, Name: gpuNode, NodeName: "gpu-1", KeyHash: strings.Repeat("a", 64)})
	enrolled, err := c.Enrollments(t.Context())
	if err != nil || len(enrolled) != 1 || enrolled[0].Name != gpuNode || enrolled[0].TokenID != made.ID {
		t.Errorf("enrolled: %+v, %v", enrolled, err)
	}
	if err := c.DeleteEnrollment(t.Context(), "node", gpuNode); err != nil {
		t.Error(err)
	}
	if err := c.DeleteEnrollment(t.Context(), "node", gpuNode); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("deleted twice: %v", err)
	}
	if err := c.DeleteIntroToken(t.Context(), made.ID); err != nil {
		t.Error(err)
	}
	if err := c.DeleteIntroToken(t.Context(), made.ID); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("deleted twice: %v", err)
	}
}
