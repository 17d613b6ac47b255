package api_test

import (
	"encoding/json"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/api"
)

// TestCommandLineOfACL drives access control with the unchanged nomad, as an operator
// does on the first day.
func TestCommandLineOfACL(t *testing.T) {
	c := newCLI(t, func(c *api.Config) { c.ACL.Enabled = true })
	c.file("web.nomad.hcl", webJob)
	c.fails(1, "job status", "Permission denied")

	var first nomad.ACLToken
	c.json("acl bootstrap -json", &first)
	c.fails(1, "acl bootstrap", "ACL bootstrap already done (reset index: ")
	manager := first.SecretID
	c.token = manager
	c.run("job status", "No running jobs")

	c.file("readers.hcl", "namespace \"default\" {\n  policy = \"read\"\n}\nnode { policy = \"read\" }\n")
	c.file("bad.hcl", "namespace \"default\" {\n  policy = \"raed\"\n}\nnod { policy = \"read\" }\n")
	c.run("acl policy apply -description all-may-look readers readers.hcl", `Successfully wrote "readers" ACL policy!`)
	c.fails(1, "acl policy apply bad bad.hcl", "400", `line 2: invalid policy "raed" of block namespace: use read, write, scale, deny`, `line 4: unknown block "nod"; did you mean "node"?`)
	c.run("acl policy list", "Name Description", "readers all-may-look")
	c.run("acl policy info readers", "Name = readers", "Description = all-may-look", `policy = "read"`)
	c.fails(1, "acl policy info nosuch", "404")

	c.run("acl token create -name looker -policy readers -policy nosuch -type client",
		"Error fetching info on nosuch policy", "Name = looker", "Type = client", "Global = false", "Policies = [readers nosuch]")
	var looker nomad.ACLToken
	c.json("acl token create -name looker2 -policy readers -ttl 2h -json", &looker)
	if looker.SecretID == "" || looker.ExpirationTime == nil {
		t.Fatalf("%+v", looker)
	}
	c.run("acl token list", "Bootstrap Token", "looker", "looker2")
	c.run("acl token info "+looker.AccessorID, "Accessor ID = "+looker.AccessorID, "Name = looker2", "Secret ID = <none>")
	c.run("acl token update -name renamed "+looker.AccessorID, "Name = renamed")

	c.token = looker.SecretID
	c.run("acl token self", "Name = renamed", "Secret ID = "+looker.SecretID)
	c.run("acl policy self", "readers")
	c.run("job status", "No running jobs")
	c.run("node status", "gpu-host")
	c.fails(1, "job run web.nomad.hcl", "403", "Permission denied")
	c.fails(1, "node drain -enable -yes "+gpuNode, "Permission denied")
	c.fails(1, "acl token list", "Permission denied")
	c.fails(1, "operator raft list-peers", "Permission denied")
	c.fails(1, "operator snapshot save x.snap", "Permission denied")
	c.run("namespace list", "default")

	c.token = manager
	c.run("job run -detach web.nomad.hcl", "Job registration successful")
	c.settled("web", 2)
	c.token = looker.SecretID
	c.run("job status web", "web")
	c.run("status web", "Status")
	c.fails(1, "job stop web", "Permission denied")

	c.token = manager
	c.run("acl policy delete readers", `Successfully deleted readers policy!`)
	c.token = looker.SecretID
	c.fails(1, "job status", "Permission denied")
	c.token = manager
	c.run("acl token delete "+looker.AccessorID, "successfully deleted")
	c.token = looker.SecretID
	c.fails(1, "job status", "ACL token not found")
	c.token = "not-a-token"
	c.fails(1, "job status", "ACL token not found")
	c.token = manager
	c.run("job stop -detach -yes web")
	c.fails(1, "acl role list", "does not support ACL roles")
}

// json runs a command and reads the JSON that it prints.
func (c *cli) json(line string, v any) {
	c.Helper()
	out := c.run(line)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		c.Fatalf("nomad %s: %v\n%s", line, err, out)
	}
}
