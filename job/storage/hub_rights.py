"""Whether the token may publish to a repository on the Hub, or create it: asked before hours of training, and without
leaving anything there."""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from job.errors import DeniedError
from job.storage.hub_errors import WRITE_HINT
from job.storage.hub_repository import HubRepository

_WRITING_ROLES = {"admin", "write", "contributor"}  # in an organization; a contributor may create repositories
_DISCUSSIONS = "discussion.write"  # of a fine-grained token: to open pull requests


def require_token(repository: HubRepository) -> None:
    """Raise DeniedError where there is no token at all."""
    if get_token() is None:
        raise DeniedError(f"{repository.label}: publishing to the Hub needs a token", hint=WRITE_HINT)


def require_writing(repository: HubRepository) -> None:
    """Raise DeniedError unless the token may write to the repository, which exists."""
    with repository.errors():
        try:
            repository.api.auth_check(repository.repo, repo_type=repository.repo_type, write=True)
        except RepositoryNotFoundError:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code != 404:  # 404: a Hub that doesn't know the question
                raise
            _require_role(repository, _who(repository))


def require_pull_requests(repository: HubRepository) -> None:
    """Raise DeniedError unless the token may open pull requests on the repository, which exists and can be read."""
    who = _who(repository)
    _require_role(repository, who)
    granted = {permission for _, permissions in _grants(who) for permission in permissions}
    if _is_fine_grained(who) and _DISCUSSIONS not in granted and not any(_is_writing(name) for name in granted):
        raise DeniedError(
            f"{repository.label}: the token in HF_TOKEN is fine-grained, and may not open pull requests",
            hint="let it interact with discussions and open pull requests there",
        )


def require_creating(repository: HubRepository) -> None:
    """Raise DeniedError unless the token may create the repository, as far as the Hub tells what a token may do."""
    who = _who(repository)
    _require_role(repository, who)
    namespace, user = repository.repo.split("/")[0], str(who.get("name", ""))
    organizations = {str(org.get("name", "")).lower(): org.get("roleInOrg") for org in who.get("orgs") or []}
    if _is_fine_grained(who):
        granted = [names for entity, names in _grants(who) if entity == namespace.lower()]
        if not any(_is_writing(name) for names in granted for name in names):
            raise DeniedError(
                f"{repository.label}: there is no such repository that the token in HF_TOKEN can see, and it is "
                f"fine-grained, without write access to the repositories of {namespace}, so it can't create it",
                hint=f"give it write access to all repositories of {namespace}, or create the repository and give it "
                "write access to that one",
            )
    elif namespace.lower() in organizations:
        role = organizations[namespace.lower()]
        if role is not None and role not in _WRITING_ROLES:
            raise DeniedError(
                f"{repository.label}: there is no such repository, and {user} can't create it: the role in the "
                f"organization {namespace} is {role}",
                hint=f"ask an admin of {namespace} for the role contributor or write",
            )
    elif namespace.lower() != user.lower():
        raise DeniedError(
            f"{repository.label}: there is no such repository that {user}, whose token is in HF_TOKEN, can see, and "
            f"{user} is no member of {namespace}, so can't create it",
            hint=f"check the name, publish to {user}/..., or use the token of a member of {namespace}",
        )


def _who(repository: HubRepository) -> dict[str, Any]:
    with repository.errors():
        # The Hub answers this question seldom, so once for each start.
        who: dict[str, Any] = repository.api.whoami(cache=True)
        return who


def _require_role(repository: HubRepository, who: Mapping[str, Any]) -> None:
    if _access_token(who).get("role") == "read":
        raise DeniedError(f"{repository.label}: the token in HF_TOKEN may only read", hint=WRITE_HINT)


def _access_token(who: Mapping[str, Any]) -> Mapping[str, Any]:
    token: Mapping[str, Any] = (who.get("auth") or {}).get("accessToken") or {}
    return token


def _is_fine_grained(who: Mapping[str, Any]) -> bool:
    return _access_token(who).get("role") == "fineGrained"


def _grants(who: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield what a fine-grained token may do: the name of a user, organization or repository, in lower case ("" for
    all), and the permissions there, such as repo.content.read and repo.write."""
    granted = _access_token(who).get("fineGrained") or {}
    yield "", list(granted.get("global") or [])
    for scope in granted.get("scoped") or []:
        yield str((scope.get("entity") or {}).get("name", "")).lower(), list(scope.get("permissions") or [])


def _is_writing(permission: str) -> bool:
    """Say whether a permission is one to change repositories: repo.write, or a contributor's to create its own."""
    return permission.startswith("repo.") and not permission.endswith(".read")
