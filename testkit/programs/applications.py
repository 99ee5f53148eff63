"""Applications for servers, not for steer: they answer with what they are."""

import functools

LENGTH = [(b"content-length", b"14")]


def answer(start_response):
    start_response("200 OK", [("Content-Length", "14")])
    return [b'{"by": "wsgi"}']


async def speak(scope, receive, send):
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind.endswith("shutdown"):
            return
    await send({"type": "http.response.start", "status": 200, "headers": LENGTH})
    await send({"type": "http.response.body", "body": b'{"by": "asgi"}'})


async def function(scope, receive, send):
    await speak(scope, receive, send)


class Application:
    async def __call__(self, scope, receive, send):
        await speak(scope, receive, send)


class Plain:
    def __call__(self, environ, start_response):
        return answer(start_response)


class Asgi2:
    def __init__(self, scope):
        self.scope = scope

    async def __call__(self, receive, send):
        await speak(self.scope, receive, send)


instance, partial, plain = Application(), functools.partial(function), Plain()


def synchronous(scope, receive, send):
    return speak(scope, receive, send)


def asgi2(scope):
    return Asgi2(scope)


def wsgi(environ, start_response):
    return answer(start_response)


class WsgiClass:
    def __init__(self, environ, start_response):
        self.start = start_response

    def __iter__(self):
        return iter(answer(self.start))


class Holder:
    application = plain


def make_asgi():
    return instance


def make_wsgi():
    return wsgi


def returns_asgi(thing=None):
    return instance
